"""The trial program behind the second half of gpu.md, kept as a record: it belongs to commit 24d4aab and is not maintained.

    python trials.py full|lora|compile|ratio|fp32|lora2|clearn|csample|cregion runs/random-stable-diffusion

In the project's folder. Seconds a query, peak GB and |ratio - 1| of variants of the code go to trials_PART.jsonl in the folder that the variable OUT names, or /tmp.
"""
import contextlib, copy, gc, inspect, json, os, sys, time
from dataclasses import replace
from functools import partial
sys.path.insert(0, os.getcwd())
import torch
import sampling, ddpo, models
from ddpo import accumulate, clipped_loss, optimizer_step, surrogate
from models import decode, encode_prompts
from prompts import load_prompts
from sampling import Schedule, load_policy, rollout, score
from settings import build_config
from train import Experiment
from tqdm import tqdm

PART, MODEL = sys.argv[1:3]
SECONDS = float(os.environ.get("PART_SECONDS", 300)) - 10
START = time.perf_counter()
CUDA = torch.cuda.is_available()
DEV = "cuda" if CUDA else "cpu"
TINY = bool(os.environ.get("TINY"))
T = 6 if TINY else 50
OUT = os.environ.get("OUT", "/tmp")
ROWS_FILE = open(f"{OUT}/trials_{PART}.jsonl", "a")
TEXTS = [p.text for p in load_prompts("common_animals")]
TEXTS = (TEXTS * 9)[:128]


def sync():
    if CUDA:
        torch.cuda.synchronize()

def gb():
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0

def static():
    return torch.cuda.memory_allocated() / 1e9 if CUDA else 0.0

import fcntl
LOCK = open("/tmp/measure.lock", "w")
def timed(work, again=None):
    fcntl.flock(LOCK, fcntl.LOCK_EX)
    try:
        return timed_alone(work)
    finally:
        fcntl.flock(LOCK, fcntl.LOCK_UN)

def timed_alone(work):
    if CUDA:
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    sync()
    return result, time.perf_counter() - start, gb()

def clean():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()

def cut(schedule, rows):
    rows = torch.as_tensor(rows)
    pick = lambda v: v[rows.to(v.device)]
    return Schedule(pick(schedule.timesteps), pick(schedule.alpha_bar), pick(schedule.alpha_bar_prev), pick(schedule.sigma),
                    schedule.prediction_type)

TEN = [0, 1, 2, 3, T - 2, T - 1] if TINY else [0, 1, 2, 3, 44, 45, 46, 47, 48, 49]  # first 4 and last 6 of the 50 steps

def draw(policy, images, batch, rows=TEN, seed=0):
    return rollout(replace(policy, schedule=cut(policy.schedule, rows)), TEXTS[:images], torch.Generator().manual_seed(seed), batch)

def sampling_cost(policy, batch, images=None, rows=TEN):
    """Trajectory, seconds of 50 steps an image (without decoding), peak GB."""
    images = images or max(batch, 16)
    draw(policy, batch, batch, rows[:1])  # warm up
    trajectory, seconds, peak = timed(lambda: draw(policy, images, batch, rows))
    return trajectory, seconds / images / len(rows) * T, peak

class Bar:
    def update(self, n): pass

def learning_cost(policy, trajectory, scaler, config, micro, n, seed=0, context=contextlib.nullcontext):
    """Seconds of 50 pairs (forward and backward), peak GB."""
    B, steps = trajectory.log_probs.shape
    pairs = torch.cartesian_prod(torch.arange(B), torch.arange(steps))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))][:n if not TINY else 2]
    advantages = torch.randn(B).abs().to(policy.device)
    def work(pairs):
        with context():
            accumulate(pairs.split(micro), lambda part: surrogate(policy, trajectory, advantages, part, clipped_loss, config),
                       scaler, Bar())
    work(pairs[:micro])
    _, seconds, peak = timed(lambda: work(pairs))
    return seconds / len(pairs) * T, peak

def ratio(policy, trajectory, micro, pairs=None, grad=False, n=None):
    """Figures of |ratio - 1| when the recorded pairs are scored micro at a time."""
    B, steps = trajectory.log_probs.shape
    if pairs is None:
        pairs = torch.cartesian_prod(torch.arange(B), torch.arange(steps))
        if n:
            pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))][:n]
    out = []
    for part in pairs.split(micro):
        with torch.enable_grad() if grad else torch.no_grad():
            out.append(score(policy, trajectory, *part.T)[0].detach())
    scored = torch.cat(out)
    i, k = pairs.T
    dev = ((scored - trajectory.log_probs[i.to(DEV), k.to(DEV)]).exp() - 1).abs().double().cpu()
    early = dev[k < steps - 2]
    by_step = {int(s): float(dev[k == s].max()) for s in sorted(set(k.tolist()))[-3:]}
    return {"max": dev.max().item(), "median": dev.median().item(), "p99": dev.quantile(.99).item(),
            "over_1e-4": (dev > 1e-4).double().mean().item(), "max_without_last_two": early.max().item() if len(early) else None,
            "last_steps": by_step, "pairs": len(dev)}

def show(name, **values):
    ROWS_FILE.write(json.dumps({"name": name, **values}) + "\n"); ROWS_FILE.flush()
    def text(v):
        if isinstance(v, float): return f"{v:.4g}"
        if isinstance(v, dict): return "{" + ", ".join(f"{k}: {text(x)}" for k, x in v.items()) + "}"
        return str(v)
    print(f"[{time.perf_counter() - START:5.0f}s] {name}: " + "; ".join(f"{k} {text(v)}" for k, v in values.items()), flush=True)

def part(name, need=0):
    """Run a part of the program at once; a failure must not stop the others."""
    def run(work):
        if time.perf_counter() - START + need > SECONDS:
            print(f"[skipped: no time] {name}", flush=True)
            return
        try:
            work()
        except Exception as error:
            import traceback
            show(name + " FAILED", error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            traceback.print_exc(limit=-4)
        clean()
    return run

def variant(name, policy, scaler, config, batch=16, micros=((4, 32),), with_ratio=True, context=contextlib.nullcontext,
            sample_context=contextlib.nullcontext, grad_ratio=False):
    values = {"static_GB": static()}
    with sample_context():
        trajectory, values["sample_s/query"], values["sample_GB"] = sampling_cost(policy, batch)
    values["sample_batch"] = batch
    if with_ratio:
        with context():
            values["ratio_at_4"] = ratio(policy, trajectory, 4, grad=grad_ratio, n=80)
    show(name + " | sampling", **values)
    for micro, n in micros:
        seconds, peak = learning_cost(policy, trajectory, scaler, config, micro, n, context=context)
        show(name + f" | learning micro {micro}", **{"learn_s/query": seconds, "learn_GB": peak})
    return trajectory


# ---- Switches ----

NO_ASSERT = {}
exec(inspect.getsource(sampling.ddim_mean_sigma).replace("    assert matches.any(1).all(), \"t holds a timestep that is not in the schedule\"\n", ""),
     sampling.__dict__, NO_ASSERT)
assert "assert" not in inspect.getsource(sampling.ddim_mean_sigma).replace("assert matches.any(1).all()", "")

@contextlib.contextmanager
def patched(module, name, value):
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)

CACHE = {}
def cached_encode(pipeline, prompts):
    missing = [p for p in dict.fromkeys([*prompts, ""]) if p not in CACHE]
    for p in missing:
        CACHE[p] = models.encode_prompts(pipeline, [p])[0]
    return torch.cat([CACHE[p] for p in prompts]), CACHE[""]

def plain_encode(pipeline, prompts):  # under an outer autocast the text encoder stays fp32
    with torch.autocast(DEV, enabled=False):
        return models.encode_prompts(pipeline, prompts)

@contextlib.contextmanager
def outer_autocast(precision, encode=plain_encode):
    with patched(sampling, "encode_prompts", encode), models.autocast(DEV, precision):
        yield

@contextlib.contextmanager
def tf32(on=True):
    old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high"); torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old[0]); torch.backends.cudnn.allow_tf32 = old[1]

def experiment_of(policy, config, parameters=None, **options):
    experiment = Experiment(config, policy)
    experiment.remembered = None
    if experiment.scaler.is_enabled():
        experiment.scaler = torch.amp.GradScaler(policy.device.type, init_scale=2.0**8, growth_interval=10**6)
    experiment.optimizer = torch.optim.AdamW(parameters or policy.unet.parameters(), lr=0.0, weight_decay=1e-4, **options)  # lr 0: weights stay
    return experiment

def first_step(policy, experiment, config, trajectory, micro=1):
    """So that the optimizer's state exists, and counts as memory."""
    learning_cost(policy, trajectory, experiment.scaler, config, micro, micro)
    for p in policy.unet.parameters():
        if p.grad is not None:
            p.grad.zero_()
    experiment.optimizer.step()
    experiment.optimizer.zero_grad()

def step_seconds(policy, experiment, config, trajectory, reps=4):
    times = []
    for _ in range(reps):
        experiment.optimizer.zero_grad()
        learning_cost(policy, trajectory, experiment.scaler, config, 1, 1)
        (norm, stepped), seconds, peak = timed(lambda: optimizer_step(policy.unet, experiment.optimizer, experiment.scaler, 1.0))
        times.append(seconds)
    show("optimizer_step", seconds=sorted(times)[len(times) // 2], norm=norm, stepped=bool(stepped), peak_GB=peak)

def config_of(precision):
    flags = {"preset": "paper", "model": MODEL, "precision": precision, "samples_per_epoch": 16, "updates_per_epoch": 1}
    if TINY: flags["sampling_steps"] = T
    config = build_config({**flags, "precision": "fp32"})
    return replace(config, precision=precision)

def policy_of(precision):
    config = config_of(precision)
    start = time.perf_counter()
    policy = load_policy(config.model, config.sampling_steps, config.eta, config.guidance_scale, config.device, precision)
    sync()
    show("loaded", precision=precision, seconds=time.perf_counter() - start, static_GB=static())
    return config, policy

def pure_half(unet, dtype):
    """Inputs in half precision: for a U-Net with half-precision weights and no autocast."""
    def hook(module, args):
        x, t, states = args
        return x.to(dtype), t, states.to(dtype)
    return unet.register_forward_pre_hook(hook)


# ---- Part A: full fine-tuning, eager ----

def part_full():
    config, policy = policy_of("fp16")
    dropouts = {m.p for m in policy.unet.modules() if isinstance(m, torch.nn.Dropout)}
    show("dropout of the U-Net", p=str(dropouts), training=policy.unet.training)
    experiment = experiment_of(policy, config)
    scaler = experiment.scaler
    bf16, fp32 = replace(policy, precision="bf16"), replace(policy, precision="fp32")
    off = torch.amp.GradScaler(DEV, enabled=False)
    box = {}

    @part("first step")
    def _():
        box["t"] = draw(policy, 4, 4)
        first_step(policy, experiment, config, box["t"])
        show("after the first step", static_GB=static())

    @part("baseline fp16")
    def _():
        box["t"] = variant("baseline fp16", policy, scaler, config, micros=((1, 16), (2, 16), (4, 48), (8, 48), (16, 64)))

    @part("sample batches fp16")
    def _():
        for batch in (1, 4, 8, 32):
            _, seconds, peak = sampling_cost(policy, batch, images=max(batch, 4))
            show(f"baseline fp16 | sampling batch {batch}", **{"sample_s/query": seconds, "sample_GB": peak})

    @part("decode")
    def _():
        for precision in ("fp16", "bf16"):
            decode(policy.pipeline, box["t"].x_0[:8], precision)
            _, seconds, peak = timed(lambda: decode(policy.pipeline, box["t"].x_0[:16], precision))
            show(f"decode {precision}", **{"s/image": seconds / 16, "peak_GB": peak})

    @part("profile fp16")
    def _():
        from torch.profiler import profile, ProfilerActivity
        acts = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
        for name, work in (("sampling batch 16, 3 steps", lambda: draw(policy, 16, 16, TEN[:3])),
                           ("learning micro 4, 3 micro-batches", lambda: learning_cost(policy, box["t"], scaler, config, 4, 8))):
            sync()
            with profile(activities=acts) as prof:
                start = time.perf_counter(); work(); sync(); wall = time.perf_counter() - start
            kernels = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            total = {}
            for e in kernels:
                k = total.setdefault(e.name, [0, 0.0]); k[0] += 1; k[1] += e.time_range.elapsed_us()
            busy = sum(v[1] for v in total.values()) / 1e6
            show(f"profile {name}", wall_s=wall, gpu_busy_s=busy, kernels=len(kernels))
            with open(f"{OUT}/profile.txt", "a") as file:
                file.write(f"== {name}: wall {wall:.4f} s (profiled), GPU busy {busy:.4f} s, {len(kernels)} kernels\n")
                for kname, (count, us) in sorted(total.items(), key=lambda kv: -kv[1][1])[:40]:
                    file.write(f"{us / 1e6:9.4f} s {us / 1e4 / max(busy, 1e-9):5.1f} % {count:6d} x  {kname[:150]}\n")
                file.write(prof.key_averages().table(sort_by="self_cuda_time_total" if CUDA else "self_cpu_time_total", row_limit=30, max_name_column_width=60) + "\n")

    @part("gradient checkpointing fp16")
    def _():
        policy.unet.enable_gradient_checkpointing()
        try:
            for micro, n in ((1, 8), (2, 16), (4, 32), (16, 32), (32, 64)):
                seconds, peak = learning_cost(policy, box["t"], scaler, config, micro, n)
                show(f"full + checkpointing fp16 | learning micro {micro}", **{"learn_s/query": seconds, "learn_GB": peak})
            show("full + checkpointing fp16", ratio_at_4=ratio(policy, box["t"], 4, grad=True, n=24))
        finally:
            policy.unet.disable_gradient_checkpointing()

    @part("channels_last", need=8)
    def _():
        policy.unet.zero_grad(set_to_none=True)
        policy.unet.to(memory_format=torch.channels_last)
        variant("channels_last fp16", policy, scaler, config, micros=((1, 16), (4, 48), (16, 64)))
        with patched(sampling, "ddim_mean_sigma", NO_ASSERT["ddim_mean_sigma"]), patched(sampling, "encode_prompts", cached_encode):
            outer = partial(outer_autocast, "fp16", cached_encode)
            variant("channels_last + one autocast + cached prompts + no sync, fp16", policy, scaler, config, micros=((4, 48), (16, 64)), context=outer, sample_context=outer)
        policy.unet.to(memory_format=torch.contiguous_format)

    @part("outer autocast", need=8)
    def _():
        outer = partial(outer_autocast, "fp16")
        variant("one autocast per rollout and update, fp16", policy, scaler, config, micros=((1, 16), (4, 48), (16, 64)),
                context=outer, sample_context=outer)

    @part("pure half", need=8)
    def _():
        half = copy.deepcopy(policy.unet).half()
        pipeline = copy.copy(policy.pipeline); pipeline.unet = half
        hook = pure_half(half, torch.float16)
        pure = replace(policy, pipeline=pipeline, precision="fp32")
        with patched(sampling, "autocast", lambda *a: contextlib.nullcontext()):
            t, seconds, peak = sampling_cost(pure, 16)
            show("half weights, no autocast, fp16 | sampling batch 16", **{"sample_s/query": seconds, "sample_GB": peak, "ratio_at_4": ratio(pure, t, 4, n=80)})
            seconds, peak = learning_cost(pure, t, off, config, 4, 48)
            show("half weights, no autocast, fp16 (gradients in half: a bound only) | learning micro 4", **{"learn_s/query": seconds, "learn_GB": peak})
        show("drawn without autocast, scored with it", ratio_at_4=ratio(policy, t, 4, n=80))

    @part("no sync", need=8)
    def _():
        with patched(sampling, "ddim_mean_sigma", NO_ASSERT["ddim_mean_sigma"]):
            variant("no assert (no sync) fp16", policy, scaler, config, micros=((1, 16), (4, 48)), with_ratio=False)

    @part("cached prompts", need=6)
    def _():
        with patched(sampling, "encode_prompts", cached_encode):
            variant("prompt encodings cached, fp16", policy, scaler, config, micros=((1, 16), (4, 48)), with_ratio=False)

    @part("fused AdamW", need=5)
    def _():
        step_seconds(policy, experiment, config, box["t"])
        experiment.optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=0.0, weight_decay=1e-4)
        clean()
        fused = experiment_of(policy, config, fused=True)
        show("now fused")
        step_seconds(policy, fused, config, box["t"])
        experiment.optimizer = fused.optimizer

    @part("cudnn attention", need=6)
    def _():
        from torch.nn.attention import SDPBackend, sdpa_kernel
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
            variant("cuDNN attention first, fp16", policy, scaler, config, micros=((4, 48),))

    @part("bf16")
    def _():
        variant("baseline bf16", bf16, off, config, micros=((4, 32), (16, 32)))

    @part("fp32", need=15)
    def _():
        for name, context in (("fp32", contextlib.nullcontext), ("fp32 + TF32", tf32)):
            with context():
                t, seconds, peak = sampling_cost(fp32, 8, images=8, rows=TEN[-5:])
                show(f"{name} | sampling batch 8", **{"sample_s/query": seconds, "sample_GB": peak, "ratio_at_4": ratio(fp32, t, 4, n=24)})
                seconds, peak = learning_cost(fp32, t, off, config, 4, 8)
                show(f"{name} | learning micro 4", **{"learn_s/query": seconds, "learn_GB": peak})

    @part("ratio fp16")
    def _():
        t = draw(policy, 8, 8, rows=range(T) if not TINY else TEN)
        show("fp16, all 50 steps, drawn 8 at a time", ratio_at_16=ratio(policy, t, 16), ratio_at_4=ratio(policy, t, 4, n=100),
             ratio_at_1=ratio(policy, t, 1, n=50))
        same = torch.cat([torch.stack([torch.arange(8), torch.full((8,), k)], 1) for k in range(0, t.log_probs.shape[1], 5)])
        show("fp16, scored in the batches that were drawn", ratio=ratio(policy, t, 8, pairs=same))

    @part("ratio bf16")
    def _():
        t = draw(bf16, 8, 8, rows=range(T) if not TINY else TEN)
        show("bf16, all 50 steps, drawn 8 at a time", ratio_at_16=ratio(bf16, t, 16), ratio_at_4=ratio(bf16, t, 4, n=100))

    @part("encode")
    def _():
        encode_prompts(policy.pipeline, TEXTS[:4])
        _, seconds, _ = timed(lambda: [encode_prompts(policy.pipeline, TEXTS[:4]) for _ in range(10)])
        show("encode 4 prompts", seconds=seconds / 10)

    @part("fp16 + TF32", need=6)
    def _():
        with tf32():
            variant("fp16 + TF32", policy, scaler, config, micros=((4, 48),), with_ratio=False)

    @part("cudnn.benchmark", need=15)
    def _():
        torch.backends.cudnn.benchmark = True
        policy.unet.to(memory_format=torch.channels_last)
        variant("channels_last + cudnn.benchmark fp16", policy, scaler, config, micros=((4, 48),))
        torch.backends.cudnn.benchmark = False

    @part("remember", need=15)
    def _():
        _, seconds, _ = timed(experiment.remember)
        show("Experiment.remember (weights and AdamW's state to the CPU)", seconds=seconds)


# ---- Part L: LoRA ----

def part_lora():
    from peft import LoraConfig
    config, policy = policy_of("fp16")
    policy.unet.requires_grad_(False)
    policy.unet.half()
    policy.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    adapters = [p for p in policy.unet.parameters() if p.requires_grad]
    for p in adapters:
        p.data = p.data.float()
    clean()
    show("LoRA", adapters_million=sum(p.numel() for p in adapters) / 1e6, static_GB=static(), dtypes=str({str(p.dtype) for p in policy.unet.parameters()}))
    experiment = experiment_of(policy, config, adapters)
    scaler = experiment.scaler
    off = torch.amp.GradScaler(DEV, enabled=False)
    box = {}

    @part("LoRA fp16")
    def _():
        box["t"] = draw(policy, 4, 4)
        first_step(policy, experiment, config, box["t"])
        box["t"] = variant("LoRA fp16", policy, scaler, config, micros=((1, 16), (2, 16), (4, 48), (8, 48), (16, 64), (32, 64)))
        step_seconds(policy, experiment, config, box["t"])

    @part("LoRA + checkpointing")
    def _():
        policy.unet.enable_gradient_checkpointing()
        try:
            for micro, n in ((1, 8), (2, 16), (4, 32), (16, 32), (32, 64)):
                seconds, peak = learning_cost(policy, box["t"], scaler, config, micro, n)
                show(f"LoRA + checkpointing fp16 | learning micro {micro}", **{"learn_s/query": seconds, "learn_GB": peak})
            show("LoRA + checkpointing fp16", ratio_at_4=ratio(policy, box["t"], 4, grad=True, n=24))
        finally:
            policy.unet.disable_gradient_checkpointing()

    @part("LoRA small sampling")
    def _():
        for batch in (1, 4):
            _, seconds, peak = sampling_cost(policy, batch, images=4)
            show(f"LoRA fp16 | sampling batch {batch}", **{"sample_s/query": seconds, "sample_GB": peak})

    @part("LoRA with half VAE and text encoder", need=6)
    def _():
        vae = policy.pipeline.vae
        decode(policy.pipeline, box["t"].x_0[:1], "fp16")
        for images in (1, 8):
            _, seconds, peak = timed(lambda: decode(policy.pipeline, box["t"].x_0[:images], "fp16"))
            show(f"LoRA fp16 | decode {images} at once", **{"s/image": seconds / images, "peak_GB": peak})

    @part("LoRA, no autocast", need=8)
    def _():
        hook = pure_half(policy.unet, torch.float16)
        with patched(sampling, "autocast", lambda *a: contextlib.nullcontext()):
            variant("LoRA fp16 without autocast", policy, scaler, config, micros=((1, 16), (4, 48), (16, 64)))
        hook.remove()

    @part("LoRA channels_last", need=8)
    def _():
        policy.unet.to(memory_format=torch.channels_last)
        variant("LoRA channels_last fp16", policy, scaler, config, micros=((4, 48), (16, 64)), with_ratio=False)
        policy.unet.to(memory_format=torch.contiguous_format)

    @part("LoRA bf16", need=8)
    def _():
        policy.unet.to(torch.bfloat16)
        for p in adapters:
            p.data = p.data.float()
        variant("LoRA bf16", replace(policy, precision="bf16"), off, config, micros=((4, 48),))


# ---- Part C: torch.compile ----

def part_compile():
    config, policy = policy_of("fp16")
    experiment = experiment_of(policy, config)
    scaler = experiment.scaler
    t = draw(policy, 16, 16)
    box = {"t": t}
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 32

    @part("eager reference")
    def _():
        first_step(policy, experiment, config, t)
        variant("eager fp16 (same process)", policy, scaler, config, micros=((4, 48),), with_ratio=False)

    policy.unet.compile(dynamic=False)

    @part("compile sampling")
    def _():
        _, seconds, _ = timed(lambda: draw(policy, 16, 16, TEN[:1]))
        show("compile of sampling, batch 16", seconds=seconds)
        box["t"], seconds, peak = sampling_cost(policy, 16)
        show("compiled fp16 | sampling batch 16", **{"sample_s/query": seconds, "sample_GB": peak})
        show("compiled draws, scored by compiled code without gradient, 16 at a time", ratio=ratio(policy, box["t"], 16, n=64))

    @part("compile learning")
    def _():
        _, seconds, _ = timed(lambda: learning_cost(policy, box["t"], scaler, config, 4, 4))
        show("compile of learning, micro 4", seconds=seconds)
        seconds, peak = learning_cost(policy, box["t"], scaler, config, 4, 96)
        show("compiled fp16 | learning micro 4", **{"learn_s/query": seconds, "learn_GB": peak})
        show("compiled draws, scored by compiled code with gradient, 4 at a time", ratio_at_4=ratio(policy, box["t"], 4, grad=True, n=80))
        show("eager draws, scored by compiled code with gradient, 4 at a time", ratio_at_4=ratio(policy, t, 4, grad=True, n=80))

    @part("compile learning 16", need=60)
    def _():
        _, seconds, _ = timed(lambda: learning_cost(policy, box["t"], scaler, config, 16, 16))
        show("compile of learning, micro 16", seconds=seconds)
        seconds, peak = learning_cost(policy, box["t"], scaler, config, 16, 96)
        show("compiled fp16 | learning micro 16", **{"learn_s/query": seconds, "learn_GB": peak})



# ---- The second call ----

def part_fp32():
    config, policy = policy_of("fp32")
    off = torch.amp.GradScaler(DEV, enabled=False)
    for name, context in (("fp32", contextlib.nullcontext), ("fp32 + TF32", tf32)):
        @part(name)
        def _():
            with context():
                t, seconds, peak = sampling_cost(policy, 8, images=8, rows=TEN[-5:])
                show(f"{name} | sampling batch 8", **{"sample_s/query": seconds, "sample_GB": peak, "ratio_at_4": ratio(policy, t, 4, n=24)})
                for micro in (2, 4):
                    seconds, peak = learning_cost(policy, t, off, config, micro, 12)
                    show(f"{name} | learning micro {micro}", **{"learn_s/query": seconds, "learn_GB_without_AdamW": peak})

def part_ratio():
    config, policy = policy_of("fp16")
    bf16 = replace(policy, precision="bf16")
    for name, p in (("fp16", policy), ("bf16", bf16)):
        @part("ratio " + name)
        def _():
            t = draw(p, 8, 8, rows=range(T))
            show(f"{name}, all 50 steps, drawn 8 at a time", ratio_at_16=ratio(p, t, 16), ratio_at_4=ratio(p, t, 4, n=100))
            same = torch.cat([torch.stack([torch.arange(8), torch.full((8,), k)], 1) for k in range(0, t.log_probs.shape[1], 5)])
            show(f"{name}, scored in the batches that were drawn", ratio=ratio(p, t, 8, pairs=same))

def eager(policy):
    policy.unet._compiled_call_impl = None

def part_csample():
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64
    config, policy = policy_of("fp16")
    policy.unet.compile(dynamic=False)
    start = time.perf_counter(); draw(policy, 16, 16, TEN[:1]); sync()
    show("compile of sampling, batch 16", seconds=time.perf_counter() - start)
    for _ in range(2):
        t, seconds, peak = sampling_cost(policy, 16)
        show("compiled fp16 | sampling batch 16", **{"sample_s/query": seconds, "sample_GB_without_AdamW": peak})
    torch.save([t.latents.cpu(), t.log_probs.cpu(), t.timesteps.cpu(), t.prompts], "/tmp/new.pt"); os.replace("/tmp/new.pt", "/tmp/compiled.pt")
    show("compiled draws, scored by the same code, 16 at a time", ratio=ratio(policy, t, 16, n=64))
    eager(policy)
    show("compiled draws, scored by eager code", ratio_at_4=ratio(policy, t, 4, n=80))

def compiled_ratio(policy, name):
    if os.path.exists("/tmp/compiled.pt"):
        latents, log_probs, timesteps, prompts = torch.load("/tmp/compiled.pt")
        t = sampling.Trajectory(latents.to(DEV), log_probs.to(DEV), timesteps.to(DEV), prompts)
        show(name, ratio_at_4=ratio(policy, t, 4, grad=True, n=80))
    else:
        print("no compiled draws yet", flush=True)

def part_clearn():
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64
    config, policy = policy_of("fp16")
    scaler = torch.amp.GradScaler(DEV, init_scale=2.0**8)
    t = draw(policy, 16, 8)
    policy.unet.compile(dynamic=False)
    start = time.perf_counter(); learning_cost(policy, t, scaler, config, 4, 4); sync()
    show("compile of learning, micro 4", seconds=time.perf_counter() - start)
    for _ in range(2):
        seconds, peak = learning_cost(policy, t, scaler, config, 4, 96)
        show("compiled fp16 | learning micro 4", **{"learn_s/query": seconds, "learn_GB_without_AdamW": peak})
    show("eager draws, scored by compiled code with gradient", ratio_at_4=ratio(policy, t, 4, grad=True, n=80))
    compiled_ratio(policy, "compiled draws, scored by compiled code with gradient")

def part_cregion():
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1000
    config, policy = policy_of("fp16")
    scaler = torch.amp.GradScaler(DEV, init_scale=2.0**8)
    blocks = [m for m in policy.unet.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")]
    for block in blocks:
        block.compile(dynamic=False)
    start = time.perf_counter(); draw(policy, 16, 16, TEN[:1]); sync()
    show(f"regional compile of sampling, batch 16 ({len(blocks)} blocks)", seconds=time.perf_counter() - start)
    for _ in range(2):
        t, seconds, peak = sampling_cost(policy, 16)
        show("regionally compiled fp16 | sampling batch 16", **{"sample_s/query": seconds, "sample_GB_without_AdamW": peak})
    start = time.perf_counter(); learning_cost(policy, t, scaler, config, 4, 4); sync()
    show("regional compile of learning, micro 4", seconds=time.perf_counter() - start)
    for _ in range(2):
        seconds, peak = learning_cost(policy, t, scaler, config, 4, 96)
        show("regionally compiled fp16 | learning micro 4", **{"learn_s/query": seconds, "learn_GB_without_AdamW": peak})
    show("regionally compiled draws, scored by such code with gradient", ratio_at_4=ratio(policy, t, 4, grad=True, n=80))

def part_lora2():
    from peft import LoraConfig
    config, policy = policy_of("fp16")
    policy.unet.requires_grad_(False)
    policy.unet.half()
    policy.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    adapters = [p for p in policy.unet.parameters() if p.requires_grad]
    for p in adapters:
        p.data = p.data.float()
    clean()
    scaler = torch.amp.GradScaler(DEV, init_scale=2.0**8)
    off = torch.amp.GradScaler(DEV, enabled=False)

    @part("LoRA eager")
    def _():
        variant("LoRA fp16 (again)", policy, scaler, config, micros=((4, 64), (8, 64)), with_ratio=False)

    @part("LoRA, no autocast")
    def _():
        hook = pure_half(policy.unet, torch.float16)
        with patched(sampling, "autocast", lambda *a: contextlib.nullcontext()):
            variant("LoRA fp16 without autocast", policy, scaler, config, micros=((4, 48), (8, 48), (16, 64)))
        hook.remove()

    @part("LoRA bf16", need=12)
    def _():
        policy.unet.to(torch.bfloat16)
        for p in adapters:
            p.data = p.data.float()
        variant("LoRA bf16", replace(policy, precision="bf16"), off, config, micros=((4, 48),))


print(PART, torch.__version__, torch.cuda.get_device_name() if CUDA else "cpu", flush=True)
globals()["part_" + PART]()
print(f"{PART}: done after {time.perf_counter() - START:.0f} s", flush=True)
