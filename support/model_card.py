"""The card of a trained model, model/README.md: what the hub shows after `hf upload NAME runs/RUN/model`."""
from pathlib import Path

from huggingface_hub import ModelCardData

from rewards import display
from support.loading import save_pipeline

CARD = """---
{header}
---

# {base}, fine-tuned on {reward}

By {algorithm} (reinforcement learning, [DDPO](https://arxiv.org/abs/2305.13301)): {weights}, {queries} judged
images. On {count} fixed prompts, with fixed noise:

| | before | after |
|---|---|---|
{results}

Watched rewards were measured, never trained on.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained({source!r})
{adapters}    pipeline({prompt!r}, num_inference_steps={steps}, {options}).images[0].save("image.png")

{merge}"""
MERGE = "One pipeline of both: `python evaluate.py RUN --merge FOLDER`, or `pipeline.fuse_lora()`.\n"


def save_with_card(run, path):
    """Write a run's trained pipeline, or its adapters, and their card. NAME in it is for the hub's name."""
    config, policy, is_lora = run.config, run.policy, bool(run.config.lora_rank)
    save_pipeline(policy.pipeline, path)
    base, prompt = Path(config.model).name, run.prompts[0].text
    first, last = [[row for row in run.rows if row["eval_reward_mean"] is not None][k] for k in (0, -1)]
    rows = [(run.reward.name, first["eval_reward_mean"], last["eval_reward_mean"], run.reward.unit)]
    rows += [(f"{name} (watched)", first["watched"][name], last["watched"][name], unit)
             for name, unit in run.units.items()]
    results = [f"| {name} | {display(before, unit)} | {display(after, unit)} |"
               for name, before, after, unit in rows]
    data = ModelCardData(
        base_model=None if Path(config.model).exists() else config.model, library_name="diffusers",
        pipeline_tag="text-to-image", widget=[{"text": prompt}],
        tags=["ddpo", "reinforcement-learning", config.algorithm, *["lora"] * is_lora])
    (path / "README.md").write_text(CARD.format(
        header=data.to_yaml(), base=base, reward=run.reward.name, algorithm=config.algorithm,
        weights=f"LoRA of rank {config.lora_rank}" if is_lora else "all weights of the denoiser",
        queries=f"{last['reward_queries']:,}", count=config.eval_prompts, prompt=prompt,
        steps=config.sampling_steps, results="\n".join(results), source=config.model if is_lora else "NAME",
        options=", ".join(f"{name}={value!r}" for name, value in policy.options.items()),
        adapters='    pipeline.load_lora_weights("NAME")\n' * is_lora,
        merge=MERGE * is_lora), encoding="utf-8")
