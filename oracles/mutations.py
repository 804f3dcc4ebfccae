"""Do the tests notice a wrong line? Each mutation changes one line of a copy; then some test must fail.

    python oracles/mutations.py            # all; exit code 1 if a mutation survives
    python oracles/mutations.py 3 7        # some of them
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = "test_ddpo.py"
CARD, EMOJI, EVALUATE, GUIDANCE, HUB, LORA, MEMORY, NFT, OCR, PAGE, POLICY, PROCESSES = (
    f"tests/test_{name}.py" for name in ("card", "emoji", "evaluate", "guidance", "hub", "lora", "memory",
                                         "nft", "ocr", "page", "policy", "processes"))
PROMPTS, REWARDS, RUNS, SETTINGS, STUDIES, TRACKERS = (
    f"tests/test_{name}.py" for name in ("prompts", "rewards", "runs", "settings", "studies", "trackers"))

# (file, the line as it is, the line as it must not be, the tests that must notice)
MUTATIONS = [
    ("ddpo.py", "deviation = group.std()", "deviation = group.std() + 1e-6", METHOD),
    ("rewards.py", "config.num_hidden_layers = 40", "config.num_hidden_layers = 48", REWARDS),
    ("prompts.py", '"washing dishes"]', '"washing the dishes"]', METHOD),
    ("prompts.py", "lizard beetle ant", "lizard bug ant", METHOD),
    ("support/imagenet_animals.txt", "hammerhead, hammerhead shark", "hammerhead", METHOD),
    ("ddpo.py", "advantages * clipped).mean()", "advantages * clipped).mean() + 1", METHOD),
    # sampling.py
    ("support/schedulers.py", "scheduler.final_alpha_cumprod.reshape(1)", "scheduler.alphas_cumprod[:1]",
     METHOD),
    ("sampling.py", "return density.flatten(1).mean(1)", "return density.flatten(1).sum(1)", METHOD),
    ("sampling.py", "trajectory.latents[images, k + 1]", "trajectory.latents[images, k]", METHOD),
    ("sampling.py", "manual_seed(seed) for seed in seeds", "manual_seed(0) for seed in seeds", METHOD),
    ("sampling.py", "(1 - rho**2).clamp(min=0)", "(1 - rho).clamp(min=0)", METHOD),
    ("sampling.py", "b_prev * math.sin(eta * math.pi / 2)", "b_prev * math.sin(eta)", METHOD),
    ("sampling.py", "b * prediction, x_t + a * prediction", "b * prediction, x_t + b * prediction", METHOD),
    ("sampling.py", "or b[-1] > 0)", "or False)", METHOD),
    # ddpo.py
    ("ddpo.py", "torch.minimum(advantages * ratio", "torch.maximum(advantages * ratio", METHOD),
    ("ddpo.py", "timesteps) - config.skip_last_steps", "timesteps)", METHOD),
    ("ddpo.py", "share = len(part) / len(rows)", "share = self.config.micro_batch / len(rows)", METHOD),
    ("ddpo.py", "self.rewards[prompt]) >= enough", "self.rewards[prompt]) > enough", METHOD),
    ("ddpo.py", "[:-max(count, self.buffer)]", "[:-self.buffer]", METHOD),
    ("ddpo.py", "(self.weights, self.config.max_grad_norm)", "(self.weights, 1e9)",
     METHOD),
    ("ddpo.py", "[:config.learn_steps or learned]", "[:learned]", METHOD),
    ("ddpo.py", "rounding = 2e-7 if (group ==", "rounding = 2e-7 if True or (group ==", REWARDS),
    # baselines_rwr.py, beyond/
    ("baselines_rwr.py", "(r >= r.quantile(percentile))", "(r > r.quantile(percentile))", METHOD),
    ("baselines_rwr.py", "torch.softmax(beta * r, 0)", "torch.softmax(r / beta, 0)", METHOD),
    ("baselines_rwr.py", "policy = policy.with_guidance(config.training_guidance)", "pass", METHOD),
    ("beyond/diffusion_nft.py", "for sign in (1, -1))", "for sign in (-1, 1))", NFT),
    ("beyond/diffusion_nft.py", "error.detach().abs()", "error.abs()", NFT),
    ("beyond/diffusion_nft.py", "weight.detach(), 1 - decay", "weight.detach(), decay", NFT),
    ("beyond/diffusion_nft.py", "rewards.std(correction=0)", "rewards.std()", NFT),
    ("train.py", "with policy.with_weights(run.learner.old):", "with policy.with_weights({}):", NFT),
    ("ddpo.py", '"updates": self.updates, "old": self.old}', '"updates": self.updates, "old": {}}', NFT),
    ("policy.py", "in_fp32 = not c.lora_rank", "in_fp32 = trains and not c.lora_rank", EVALUATE),
    ("policy.py", "weight.detach().clone() for", "weight.detach() for", NFT),
    ("beyond/universal_guidance.py", "e - a / b * shift", "e - shift", GUIDANCE),
    ("beyond/universal_guidance.py", "scale * b * gradient", "scale * gradient", GUIDANCE),
    ("support/networks.py", "smooth + (exact - smooth).detach()", "smooth", REWARDS),
    ("beyond/preference_rewards.py", "- self.MEAN) / self.STD", "- self.MEAN) * self.STD", REWARDS),
    # rewards.py, prompts.py
    ("rewards.py", "* 255).round()", "* 255)", METHOD),
    ("rewards.py", "quality=95", "quality=90", METHOD),
    ("rewards.py", "values.isinf() if self.nan_allowed else ~values.isfinite()", "values.isinf()", REWARDS),
    ("rewards.py", 're.findall("[a-z0-9]+", answer.lower())', 're.findall("|".join(right), answer.lower())',
     REWARDS),
    ("rewards.py", "MAX_ANSWER = 64", "MAX_ANSWER = 40", REWARDS),
    ("rewards.py", "images[rows].clone(), prompts[rows]", "images[rows], prompts[rows]", REWARDS),
    ("rewards.py", "    @torch.no_grad()\n    def checked(", "    def checked(", REWARDS),
    ("prompts.py", '.split("\\n")  #', ".splitlines()  #", PROMPTS),
    ("prompts.py", 'encoding="utf-8-sig"', 'encoding="utf-8"', PROMPTS),
    # support/settings.py, train.py, support/run_folder.py
    ("support/settings.py", "advantage_clip: float = setting(10.0", "advantage_clip: float = setting(5.0",
     SETTINGS),
    ("emoji/preset.py", "clip_range=2e-3, skip_last_steps=2", "clip_range=2e-3, skip_last_steps=1",
     SETTINGS),
    ("support/settings.py", "config.guidance_scale in (0, config.sd_guidance)", "True", SETTINGS),
    ("support/settings.py", "if name in (config.reward, *config.watch) else", "if True else", SETTINGS),
    ("support/stopping.py", "return start - (1 - kept) * abs(start)", "return start", RUNS),
    ("train.py", "reward(images, prompts[rows])", "reward(images, prompts[:len(images)])", METHOD),
    ("train.py", "torch.Generator().manual_seed(EVAL_SEED)", "torch.Generator().manual_seed(config.seed)",
     METHOD),
    ("train.py", "values.nanmean().item()", "values.nan_to_num().mean().item()", RUNS),
    ("train.py", "torch.randperm(n, generator=rng) for _", "torch.randint(n, (n,), generator=rng) for _",
     METHOD),
    ("train.py", "        seed_rewards(config, epoch)\n", "", RUNS),
    ("train.py", "if run.epoch < 0 and tell", "if tell", RUNS),
    ("train.py", "run.save()  # so that a run", "pass  # so that a run", RUNS),
    ("train.py", "if state[\"files\"].get(name) not in (None, now):", "if False:", RUNS),
    ("support/settings.py", '.replace(f"{ROOT}/", "")', "", RUNS),
    ("support/run_folder.py", 'row["epoch"] <= epoch]', 'row["epoch"] < epoch]', RUNS),
    ("support/run_folder.py", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", RUNS),
    # policy.py, support/loading.py, support/networks.py: what would go wrong in silence
    ("support/networks.py", "missing.extend(name for name in loading_info.missing_keys",
     "missing.extend(name for name in []", POLICY),
    ("support/loading.py", "if weight.is_meta]", "if False]", POLICY),
    ("support/loading.py", "tokenizer.model_max_length = min(", "tokenizer.model_max_length = max(", POLICY),
    ("support/schedulers.py", '"trailing" if trailing else "leading"', '"leading"', POLICY),
    ("support/loading.py", "torch.float32 if overflows or in_fp32", "torch.float32 if in_fp32", POLICY),
    ("policy.py", "with torch.no_grad(), torch.autocast(device.type, enabled=False):",
     "with torch.no_grad():", POLICY),
    ("support/loading.py", "lora_alpha=alpha", "lora_alpha=rank", LORA),
    ("policy.py", "if not apart <= 1e-3:", "if False:", POLICY),
    ("policy.py", "t.repeat(self.copies_of_timesteps)", "t.flip(0).repeat(self.copies_of_timesteps)", POLICY),
    ("policy.py", "tap.latents = first if latents is None else latents", "tap.latents = first", POLICY),
    ("support/schedulers.py", '{} if mu is None else {"mu": mu}', '{} if mu is None else {"mu": 0.0}',
     POLICY),
    ("policy.py", "torch.cat(parts)[torch.cat(rows).argsort()]", "torch.cat(parts)", POLICY),
    # several processes, evaluation, trackers
    ("support/processes.py", "slice(n * rank // size(), n * (rank + 1) // size())", "slice(0, n // size())",
     PROCESSES),
    ("support/processes.py", "tensor.copy_(total)", "tensor.copy_(total / 2)", PROCESSES),
    ("sampling.py", "    processes.add_up([latents, log_probs])\n", "", PROCESSES),
    ("ddpo.py", "for one in processes.gathered([", "for one in ([", PROCESSES),
    ("train.py", "parts = processes.gathered([values])", "parts = [values]", PROCESSES),
    ("support/run_folder.py", "@by_first\ndef append_line", "def append_line", PROCESSES),
    ("support/processes.py", 'and "WORLD_SIZE" not in os.environ', "", PROCESSES),
    ("train.py", "            run.failed.add(other.name)\n", "", PROCESSES),
    ("ddpo.py", "        self.optimizer.zero_grad(set_to_none=True)\n        info", "        info", MEMORY),
    ("sampling.py", "rng.clone_state() for rng in", "rng for rng in", MEMORY),
    ("support/processes.py", "first = part.rows.stop if part.fitted() else first", "part.fitted()\n"
     "        first = part.rows.stop", MEMORY),
    ("policy.py", "raise torch.OutOfMemoryError(str(error)) from error", "raise", POLICY),
    # what a run leaves, what is read
    ("support/run_page.py", '.replace("<", "\\\\u003c")', "", PAGE),
    ("support/run_page.py", "for row in rows[1:]]", "for row in rows]", PAGE),
    ("support/model_card.py", "rows[0], rows[-1], run.reward", "rows[0], rows[0], run.reward", CARD),
    ("beyond/ocr.py", "1.0 if text in read else", "1.0 if text == read else", OCR),
    ("beyond/ocr.py", "last[j - 1] + (letter != other)", "last[j - 1] + 1", OCR),
    # what people outside run into
    ("support/networks.py", "said = said.__cause__ or said.__context__", "said = None", HUB),
    ("support/loading.py", "if odd := saved ^ {", "if odd := saved - {", LORA),
    ("support/loading.py", "    pipeline.unload_lora_weights()\n", "", LORA),
    ("prompts.py", "not isinstance(question, str) or not right", "not right", PROMPTS),
    ("support/stopping.py", "if last is None and name in run.failed:", "if False:", RUNS),
    ("evaluate.py", "(after > before).float().mean()", "(after >= before).float().mean()", EVALUATE),
    ("evaluate.py", "for source in (config.model, model)]", "for source in (model, config.model)]", EVALUATE),
    ("support/trackers.py", "purge_step=epoch + 1", "purge_step=epoch", TRACKERS),
    # emoji/, studies/
    ("emoji/judge.py", "seen[1] == asked[1]", "seen[0] == asked[0]", EMOJI),
    ("studies/report.py", "(reward[:-1] * np.diff(queries))", "(reward[1:] * np.diff(queries))", STUDIES),
    ("studies/report.py", "half * T_95[min(n, len(T_95)) - 1]", "half * T_95[min(n, len(T_95) - 1)]",
     STUDIES),
]


def survives(file, line, wrong, tests):
    """Whether the tests pass on a copy of the project in which that line is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        path = Path(folder) / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(line, wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", tests]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    # Else they did not run to an end
    assert done.returncode in (0, 1), done.stdout[-500:] + done.stderr[-500:]
    failed = [row for row in done.stdout.splitlines() if row.startswith(("FAILED", "ERROR"))]
    what = wrong.strip() if wrong != line else "no mutation"
    print(f"{file}: {what}\n    {failed[0] if failed else tests + ' passes'}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    for file, line, _, _ in MUTATIONS:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, f"{file} has not once: {line}"
    for tests in sorted({MUTATIONS[number - 1][3] for number in chosen}):  # else a failure would tell nothing
        assert survives("ddpo.py", "import torch\n", "import torch\n",
                        tests), f"{tests} fails without a mutation"
    survivors = [number for number in chosen if survives(*MUTATIONS[number - 1])]
    print(f"{len(chosen)} mutations, {len(survivors)} survive: {survivors}")
    sys.exit(bool(survivors))
