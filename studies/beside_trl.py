"""An epoch of TRL's last DDPO trainer beside one of ours: seconds, and on a GPU peak GB, for the same work on this machine.

    pip install trl==0.23.1                                # not in requirements.txt: nothing else needs it
    python studies/beside_trl.py                           # the embedded model
    python studies/beside_trl.py --preset paper --model runs/random-stable-diffusion --images 8 --precision fp16

Both draw the same number of images in the same number of guided steps, judge their JPEG size, and learn from all steps of all images
in as many updates of all weights. Each does an epoch to warm up, then the one that is timed. TRL learns from one timestep of
some images in a forward pass, at most as many as our micro-batch has pairs.
"""
import argparse
import contextlib
import gc
import io
import itertools
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if this file is run as a script
from models import PRECISIONS
from networks import silence_libraries
from prompts import load_prompts
from rewards import load_reward
from sampling import rollout
from settings import PRESETS, Config, build_config
from studies.benchmark import timed
from train import UPDATES, Clock, build_experiment, compare, judge


def our_epoch(config):
    """A function that does one epoch of ours: paragraphs 1 to 4 of train.py."""
    experiment = build_experiment(config)
    update, keep_chain = UPDATES[config.algorithm]

    def epoch():
        prompts = [experiment.prompts[k % len(experiment.prompts)] for k in range(config.samples_per_epoch)]
        trajectory = rollout(experiment.policy, [prompt.text for prompt in prompts], experiment.rng, config.sample_batch, keep_chain)
        rewards, _ = judge(experiment, trajectory, prompts, Clock(experiment.policy.device))
        coefficients, _ = compare(experiment, trajectory.prompts, rewards)
        update(experiment.policy, trajectory, coefficients, experiment.optimizer, experiment.scaler, experiment.rng, config)

    return epoch


def epoch_of_trl(config):
    """A function that does one epoch of TRL's. Raises ValueError if TRL cannot be imported."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from accelerate import PartialState
            from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    except Exception as error:  # TRL hides a missing package behind an error of its own
        raise ValueError(f"TRL's trainer cannot be imported: pip install trl==0.23.1 ({str(error).splitlines()[-1]})") from error
    prompts, reward = itertools.cycle(load_prompts(config.prompts)), load_reward(config.reward, config.device)
    PartialState()  # TRL logs before it makes one
    images_of_update = config.samples_per_epoch // config.updates_per_epoch
    at_once = min(config.micro_batch, images_of_update)
    trainer = DDPOTrainer(
        DDPOConfig(sample_num_steps=config.sampling_steps, sample_guidance_scale=config.guidance_scale,
                   sample_batch_size=min(config.sample_batch, config.samples_per_epoch),
                   sample_num_batches_per_epoch=max(1, config.samples_per_epoch // config.sample_batch), train_batch_size=at_once,
                   train_gradient_accumulation_steps=images_of_update // at_once, train_learning_rate=config.learning_rate,
                   mixed_precision={"fp32": "no"}.get(config.precision, config.precision), allow_tf32=False, log_with=None,
                   async_reward_computation=False),
        lambda images, texts, metadata: (reward(images.float(), [next(prompts)] * len(images))[0], {}),
        lambda: (next(prompts).text, {}), DefaultDDPOStableDiffusionPipeline(config.model, use_lora=False))
    return lambda: trainer.step(0, 0)


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("emoji", "paper"), default="emoji", help="whose settings (default: emoji)")
    parser.add_argument("--model", help="folder or hub name (default: the preset's)")
    parser.add_argument("--images", type=int, default=64, help="of an epoch (default: 64)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    args = parser.parse_args(argv)
    silence_libraries()
    try:
        if args.images < 1 or args.images % min(PRESETS[args.preset].get("sample_batch", Config.sample_batch), args.images):
            raise ValueError(f"--images {args.images}: must be a multiple of the preset's --sample-batch, or less")
        updates = min(PRESETS[args.preset].get("updates_per_epoch", 4), args.images)
        config = build_config({"preset": args.preset, "precision": args.precision, "samples_per_epoch": args.images, "watch": ["none"],
                               "updates_per_epoch": updates, "skip_last_steps": 0, **({"model": args.model} if args.model else {})})
        print(f"{args.images} images of {config.sampling_steps} steps, {updates} updates, {config.precision}, {config.device}, "
              f"{torch.get_num_threads()} threads\n\n| | seconds an epoch | peak GB |\n|---|---|---|")
        for name, make in (("ours", our_epoch), ("TRL 0.23.1", epoch_of_trl)):
            epoch = make(config)
            epoch()
            _, seconds, gigabytes = timed(config.device, epoch)
            print(f"| {name} | {seconds:.1f} | {f'{gigabytes:.1f}' if gigabytes else '-'} |", flush=True)
            del epoch
            gc.collect()  # else the memory of the next one would include this one's
            torch.cuda.empty_cache()
    except (ValueError, OSError) as error:
        print(f"beside_trl.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
