"""The card of a trained model, model/README.md: what the hub shows after `hf upload NAME runs/RUN/model`."""
from pathlib import Path

from huggingface_hub import ModelCardData

from rewards import display
from support.processes import by_first
from support.run_folder import write_text

CARD = """---
{header}
---

# {base}, fine-tuned on {reward}

By `{algorithm}`, reinforcement learning: {weights}, {queries} judged images. On {count} fixed prompts:

| | before | after |
|---|---|---|
{results}

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("{source}")
{adapters}    pipeline({prompt!r}, num_inference_steps={steps}, {options}).images[0].save("image.png")

{merge}"""
MERGE = "One pipeline of both: `python evaluate.py RUN --merge FOLDER`, or `pipeline.fuse_lora()`.\n"


def before_and_after(run):
    """Queries, and (name, before, after, unit) of the trained reward, then of the watched ones."""
    rows = [row for row in run.rows if row["eval_reward_mean"] is not None]
    first, last, own = rows[0], rows[-1], run.reward
    return last["reward_queries"], [
        (own.name, first["eval_reward_mean"], last["eval_reward_mean"], own.unit),
        *((name, first["watched"][name], last["watched"][name], unit) for name, unit in run.units.items())]


@by_first
def write_card(run):
    """Write the card. NAME in it is for the model's name on the hub, BASE for that of a base from disk."""
    config, is_lora, is_file = run.config, bool(run.config.lora_rank), Path(run.config.model).exists()
    queries, rewards = before_and_after(run)
    results = [f"| {name}{' (measured, not trained on)' * (k > 0)} | {display(before, unit)} | "
               f"{display(after, unit)} |" for k, (name, before, after, unit) in enumerate(rewards)]
    data = ModelCardData(
        base_model=None if is_file else config.model, library_name="diffusers", pipeline_tag="text-to-image",
        widget=[{"text": run.prompts[0].text}],
        tags=["reinforcement-learning", config.algorithm, *["lora"] * is_lora])
    text = CARD.format(
        header=data.to_yaml(), base=Path(config.model).name, reward=run.reward.name,
        algorithm=config.algorithm,
        weights=f"LoRA of rank {config.lora_rank}" if is_lora else "all weights of the denoiser",
        queries=f"{queries:,}", count=config.eval_prompts, results="\n".join(results),
        source="NAME" if not is_lora else "BASE" if is_file else config.model, prompt=run.prompts[0].text,
        adapters='    pipeline.load_lora_weights("NAME")\n' * is_lora, merge=MERGE * is_lora,
        steps=config.eval_steps or config.sampling_steps,
        options=", ".join(f"{name}={value!r}" for name, value in run.policy.options.items()))
    write_text(run.folder / "model" / "README.md", text)
