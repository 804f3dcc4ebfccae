"""Do the tests notice a wrong line? Each mutation changes one line of a copy of the project; then some test must fail.

    python oracles/mutations.py            # all; exit code 1 if a mutation survives
    python oracles/mutations.py 3 7        # some of them

No test noticed the first seven at first. Tests were added for these and for those that are marked.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD, REWARDS, EVALUATE = "test_ddpo.py", "test_rewards.py", "test_evaluate.py"
POLICY, PROMPTS, RUNS = "test_policy.py", "test_prompts.py", "test_runs.py"
PARALLEL, LORA, GUIDANCE = "test_parallel.py", "test_lora.py", "test_guidance.py"
EMOJI, STUDIES = "emoji/test_emoji.py", "studies/test_studies.py"

# (file, the line as it is, the line as it must not be, the tests that must notice)
MUTATIONS = [
    ("ddpo.py", "deviation = group.std()", "deviation = group.std() + 1e-6", METHOD),
    ("rewards.py", "config.num_hidden_layers = 40", "config.num_hidden_layers = 48", REWARDS),
    ("rewards.py", '"microsoft/deberta-xlarge-mnli"', '"microsoft/deberta-large-mnli"', REWARDS),
    ("prompts.py", '"washing dishes"]', '"washing the dishes"]', METHOD),
    ("prompts.py", "lizard beetle ant", "lizard bug ant", METHOD),
    ("imagenet_animals.txt", "hammerhead, hammerhead shark", "hammerhead", METHOD),
    ("ddpo.py", "advantages * clipped).mean()", "advantages * clipped).mean() + 1", METHOD),
    # sampling.py
    ("policy.py", "scheduler.final_alpha_cumprod.reshape(1)", "scheduler.alphas_cumprod[:1]", METHOD),
    ("sampling.py", "return density.flatten(1).mean(1)", "return density.flatten(1).sum(1)", METHOD),
    ("sampling.py", "trajectory.latents[images, k + 1]", "trajectory.latents[images, k]", METHOD),
    ("sampling.py", "torch.Generator().manual_seed(seed) for seed in", "torch.Generator().manual_seed(0) for seed in", METHOD),
    ("sampling.py", "(1 - rho**2).clamp(min=0)", "(1 - rho).clamp(min=0)", METHOD),
    ("sampling.py", "b_prev * math.sin(eta * math.pi / 2)", "b_prev * math.sin(eta)", METHOD),  # a test was added
    ("sampling.py", "return x_t - b * prediction, x_t + a * prediction", "return x_t - b * prediction, x_t + b * prediction", METHOD),
    ("sampling.py", "or b[-1] > 0)", "or False)", METHOD),
    # ddpo.py
    ("ddpo.py", "torch.minimum(advantages * ratio", "torch.maximum(advantages * ratio", METHOD),
    ("ddpo.py", "len(policy.schedule.timesteps) - config.skip_last_steps", "len(policy.schedule.timesteps)", METHOD),
    ("ddpo.py", "len(images[part]) / len(images) / len(steps)", "config.micro_batch / len(images) / len(steps)", METHOD),
    ("ddpo.py", ">= self.min_count", "> self.min_count", METHOD),
    ("ddpo.py", "[:-max(count, self.buffer)]", "[:-self.buffer]", METHOD),
    ("ddpo.py", "clip_grad_norm_(denoiser.parameters(), max_grad_norm)", "clip_grad_norm_(denoiser.parameters(), 1e9)", METHOD),
    # baselines_rwr.py
    ("baselines_rwr.py", "kept = (r >= r.quantile(percentile))", "kept = (r > r.quantile(percentile))", METHOD),
    ("baselines_rwr.py", "torch.softmax(beta * r, 0) * len(r)", "torch.softmax(r / beta, 0) * len(r)", METHOD),
    ("baselines_rwr.py", "policy = policy.with_guidance(config.training_guidance)", "pass", METHOD),  # a test was added
    ("baselines_rwr.py", "for sign in (1, -1))", "for sign in (-1, 1))", METHOD),
    ("policy.py", "weight.detach().clone() for", "weight.detach() for", METHOD),
    ("ddpo.py", "[:config.learn_steps or learned]", "[:learned]", METHOD),
    ("baselines_guidance.py", "e - a / b * shift", "e - shift", GUIDANCE),
    ("baselines_guidance.py", "scale * b * gradient", "scale * gradient", GUIDANCE),
    ("networks.py", "smooth + (exact - smooth).detach()", "smooth", REWARDS),
    ("settings.py", "return start - (1 - share) * abs(start)", "return start", RUNS),
    # networks.py, rewards.py, preference_rewards.py
    ("networks.py", "* 255).round()", "* 255)", METHOD),
    ("rewards.py", "quality=95", "quality=90", METHOD),
    ("rewards.py", "values.isinf() if self.nan_allowed else ~values.isfinite()", "values.isinf()", RUNS),
    ("rewards.py", 're.findall("[a-z0-9]+", answer.lower())', 're.findall("|".join(right), answer.lower())', REWARDS),
    ("rewards.py", "MAX_ANSWER = 64", "MAX_ANSWER = 40", REWARDS),
    ("preference_rewards.py", "- self.MEAN) / self.STD", "- self.MEAN) * self.STD", REWARDS),
    # settings.py, runs.py
    ("settings.py", 'advantage_clip: float = setting(10.0', 'advantage_clip: float = setting(5.0', METHOD),
    ("settings.py", '"skip_last_steps": 2,\n        "sample_batch"', '"skip_last_steps": 1,\n        "sample_batch"', STUDIES),  # a test was added
    ("settings.py", "or name in config.watch and config.reward not in readers", "or name in config.watch", METHOD),
    ("runs.py", 'row["epoch"] <= epoch]', 'row["epoch"] < epoch]', RUNS),
    # train.py
    ("train.py", "    reward.rng_states = states\n    clock", "    clock", METHOD),  # a test was added
    ("train.py", "experiment.reward(images, prompts[part])", "experiment.reward(images, prompts[:len(images)])", METHOD),  # a test was added
    ("train.py", "torch.Generator().manual_seed(EVAL_SEED)", "torch.Generator().manual_seed(config.seed)", METHOD),
    ("train.py", "known = values[~values.isnan()]", "known = values.nan_to_num()", METHOD),
    # evaluate.py, emoji/, studies/
    ("evaluate.py", "(after > before).float().mean()", "(after >= before).float().mean()", EVALUATE),
    ("evaluate.py", "for source in (config.model, model)]", "for source in (model, config.model)]", EVALUATE),  # a test was added
    ("emoji/judge.py", "seen[1] == asked[1]", "seen[0] == asked[0]", EMOJI),
    ("emoji/pretrain.py", "np.trace(other_covariance) - 2 * cross", "np.trace(other_covariance) - cross", EMOJI),
    ("emoji/pretrain.py", "default_rng([POOL_SEED, passed, count])", "default_rng([POOL_SEED, count])", EMOJI),
    ("studies/report.py", "(reward[:-1] * np.diff(queries))", "(reward[1:] * np.diff(queries))", STUDIES),
    ("studies/report.py", "half * T_95[min(n, len(T_95)) - 1]", "half * T_95[min(n, len(T_95) - 1)]", STUDIES),
    ("studies/compare.py", "(self.config.model), self.seed, json", "(self.config.model), 0, json", STUDIES),  # a test was added
    ("studies/variance.py", "((N - 1) * leave_one_out.var())", "(leave_one_out.var())", STUDIES),
    # what would go wrong in silence
    ("networks.py", 'refuse_weights([key for key in info["missing_keys"]', "refuse_weights([key for key in []", POLICY),
    ("networks.py", "    refuse_weights(missing)\n", "", POLICY),
    ("policy.py", "if weight.is_meta])  # so diffusers", "if False])  # so diffusers", POLICY),
    ("policy.py", "tokenizer.model_max_length = min(", "tokenizer.model_max_length = max(", POLICY),
    ("policy.py", "if not apart <= 1e-3:", "if False:", POLICY),
    ("policy.py", "t.repeat(self.copies_of_timesteps)", "t.flip(0).repeat(self.copies_of_timesteps)", POLICY),
    ("policy.py", "tap.latents = first if latents is None else latents", "tap.latents = first", POLICY),
    ("policy.py", '{} if mu is None else {"mu": mu}', '{} if mu is None else {"mu": 0.0}', POLICY),
    ("policy.py", '"trailing" if trailing else "leading"', '"leading"', POLICY),
    ("policy.py", "torch.cat(parts)[torch.cat(rows).argsort()]", "torch.cat(parts)", POLICY),
    ("policy.py", "wanted = torch.float32 if overflows or in_fp32", "wanted = torch.float32 if in_fp32", POLICY),
    ("policy.py", "with torch.no_grad(), torch.autocast(device.type, enabled=False):", "with torch.no_grad():", POLICY),
    ("train.py", "torch.randperm(n, generator=rng) for _", "torch.randint(n, (n,), generator=rng) for _", METHOD),
    ("prompts.py", 'line.strip(" \\t\\ufeff")', "line.strip()", PROMPTS),
    ("prompts.py", 're.split("\\r\\n|\\n|\\r", text)', "text.splitlines()", PROMPTS),
    ("rewards.py", "given = images.clone(),", "given = images,", REWARDS),
    ("rewards.py", "prompts, torch.no_grad()), prompts)", "prompts, torch.enable_grad()), prompts)", REWARDS),
    ("process.py", "if os.getpid() != trainer:", "if False:", RUNS),
    ("runs.py", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", RUNS),
    ("train.py", "if experiment.optimizer.state:", "if True:", RUNS),
    ("train.py", "if before[name] != experiment.identity[name]:", "if False:", RUNS),
    ("settings.py", 'if value.startswith(f"{old}{os.sep}"):', "if False:", RUNS),
    ("ddpo.py", "rounding = 2e-7 if (group ==", "rounding = 2e-7 if True or (group ==", REWARDS),
    # several processes, LoRA, memory, trackers
    ("parallel.py", "slice(n * rank // size(), n * (rank + 1) // size())", "slice(0, n // size())", PARALLEL),
    ("parallel.py", "torch.cat([tensor.flatten() for tensor in bucket])", "torch.cat([tensor.flatten() for tensor in bucket[:]]) / 2", PARALLEL),
    ("process.py", "for number in came[:1]:", "for number in ():", PARALLEL),
    ("sampling.py", "    parallel.add_up([latents, log_probs])\n", "", PARALLEL),
    ("ddpo.py", "for one in parallel.gathered([", "for one in ([", PARALLEL),
    ("train.py", "other.name: mean_of_known(parallel.gathered(other(images, prompts)[0]))",
     "other.name: mean_of_known(other(images, prompts)[0])", PARALLEL),
    ("runs.py", "@by_first\ndef append_row", "def append_row", PARALLEL),
    ("settings.py", "if count > 1 and config.samples_per_epoch % count:", "if False:", PARALLEL),
    ("train.py", "if experiment.epoch < 0:", "if True:", RUNS),
    ("train.py", "experiment.save()  # so that a run", "pass  # so that a run", RUNS),
    ("policy.py", "lora_alpha=alpha", "lora_alpha=rank", LORA),
    ("studies/memory.py", "self.now -= self.alive.pop(key)", "self.alive.pop(key)", STUDIES),
    ("settings.py", "config.guidance_scale not in (0, usual_guidance(config))", "config.guidance_scale == 0", STUDIES),
    ("trackers.py", "purge_step=epoch + 1", "purge_step=epoch", "test_trackers.py"),
]


def survives(file, line, wrong, tests):
    """Whether the tests pass on a copy of the project in which that line is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        path = Path(folder) / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(line, wrong), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests], cwd=folder,
                              capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-500:] + done.stderr[-500:]  # else the tests did not run to an end
    failed = [row for row in done.stdout.splitlines() if row.startswith(("FAILED", "ERROR"))]
    print(f"{file}: {wrong.strip() if wrong != line else 'no mutation'}\n    {failed[0] if failed else tests + ' passes'}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    for file, line, _, _ in MUTATIONS:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, f"{file} has not once: {line}"
    for tests in sorted({MUTATIONS[number - 1][3] for number in chosen}):  # else a failure would tell nothing
        assert survives("ddpo.py", "import torch\n", "import torch\n", tests), f"{tests} fails without a mutation"
    survivors = [number for number in chosen if survives(*MUTATIONS[number - 1])]
    print(f"{len(chosen)} mutations, {len(survivors)} survive: {survivors}" if survivors else f"all {len(chosen)} are noticed")
    sys.exit(bool(survivors))
