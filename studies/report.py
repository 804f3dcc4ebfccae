"""Tables and figures from the finished runs of a study. A line is one run's entry in results/REWARD/STUDY.jsonl (see compare.py).

The policy of a run changes only when an epoch ends. So its reward is a step function of the queries. If an epoch ends without an
evaluation, its reward is interpolated.
"""
import numpy as np
from settings import DDPO, RWR, Config, learned_steps, lowest

import runs
from rewards import short_name, unit_of

# Student's t, two-sided 95 %, by degrees of freedom. For more, the last is a little too wide.
T_95 = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10]


# ---- Figures of one run ----

def evaluations(line):
    """A run's evaluations: queries (n,) and mean reward on the fixed prompts (n,)."""
    rows = [row for row in line["rows"] if row["eval_reward_mean"] is not None]
    return tuple(np.array([row[name] for row in rows], float) for name in ("reward_queries", "eval_reward_mean"))


def watched_values(line, name):
    """A watched reward at the run's evaluations (n,), NaN where it is not known."""
    rows = [row for row in line["rows"] if row["eval_reward_mean"] is not None]
    return np.array([(row["watched"] or {}).get(name) for row in rows], float)


def rewards_by_epoch(line):
    """Queries and reward at the end of every epoch, up to the last evaluation."""
    queries, reward = evaluations(line)
    epochs = np.array([row["reward_queries"] for row in line["rows"]], float)
    epochs = epochs[epochs <= queries[-1]]
    return epochs, np.interp(epochs, queries, reward)


def mean_during_training(line):
    """Mean reward of the policies that drew the samples: the area under the curve, divided by the queries."""
    queries, reward = rewards_by_epoch(line)
    return (reward[:-1] * np.diff(queries)).sum() / queries[-1]


def queries_to(line, gain):
    """Queries after which the reward first was that share of its start above it; NaN if it never was."""
    queries, reward = rewards_by_epoch(line)
    above = np.nonzero(reward >= reward[0] + gain * abs(reward[0]))[0]
    return queries[above[0]] if len(above) and reward[0] else np.nan


def gain_percent(line, queries=np.inf):
    """Reward gained by the end of a run, or after so many queries (interpolated), in percent of the start; NaN from a start of 0."""
    at, reward = rewards_by_epoch(line)
    end = np.interp(queries, at, reward)
    return 100 * (end - reward[0]) / abs(reward[0]) if reward[0] else np.nan


def gain_in_time(line):
    """The gain that `--stop-below NAME=90%` would have left, NAME being the first watched reward; the whole gain without one.

    It is that of the last evaluation before the watched reward is below nine tenths of its start.
    """
    queries, _ = evaluations(line)
    values = watched_values(line, next(iter(watched_units([line])), ""))
    fallen = np.nonzero(values < lowest(values[0], 0.9))[0]
    return gain_percent(line, queries[fallen[0] - 1] if len(fallen) else np.inf)


def passes_per_query(line):
    """U-Net passes that a reward query costs, learning included, for an image and a step each. Back and forth counts three.

    They stand for seconds, of which most are theirs, and are the same on every machine.
    """
    config = Config(**line["settings"])
    guided = 1 if config.guidance_scale == 1 else 2
    if config.algorithm in DDPO:
        learned, rows = learned_steps(config), guided
        each = 4 if config.kl_weight else 3  # the reference policy's pass, too
    else:
        learned = config.updates_per_epoch * config.batch_size / config.samples_per_epoch
        rows = 1 if (config.training_guidance or config.guidance_scale) == 1 else 2
        each = 4 if config.algorithm == "nft" else 3  # the old policy's
    return guided * config.sampling_steps + rows * each * learned


# ---- Figures over seeds ----

def by_label(lines):
    """label -> its lines, in the order of the first."""
    groups = {}
    for line in lines:
        groups.setdefault(line["label"], []).append(line)
    return groups


def interval(values):
    """Mean, and half the 95 % interval of the mean (Student's t over the seeds); NaN for one seed."""
    values = np.asarray(values, float)
    n = len(values)
    half = values.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return values.mean(), half * T_95[min(n, len(T_95)) - 1]


def gain_over_control(label, group, groups):
    """The gain of RWR's runs minus that of the same epochs without a reward, seed by seed; [] if these were not run."""
    control = groups.get(f"{label}, no reward", groups.get("no reward", []))
    control = {line["seed"]: gain_percent(line) for line in control}
    is_rwr = group[0]["settings"]["algorithm"] in RWR and "no reward" not in label
    return [gain_percent(line) - control[line["seed"]] for line in group if is_rwr and line["seed"] in control]


def cell(values, digits=2, scale=1.0):
    """Mean and interval as a table shows them; '-' for none."""
    mean, half = interval([scale * value for value in values]) if len(values) else (np.nan, np.nan)
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


# ---- A study's table, figure and images ----

def watched_units(lines):
    """name -> unit (see rewards.unit_of) of the watched rewards that are in the runs' rows."""
    logged = {name for line in lines for row in line["rows"] for name in row["watched"] or ()}
    return {name: unit for line in lines for name, unit in line["units"].items() if name in logged}


def table(lines, unit):
    """The study in Markdown, one row a label. unit: the reward's, see rewards.unit_of."""
    factor, watched = unit[0], watched_units(lines)
    first = list(watched)[:1]  # a column of its own, if anything is watched
    rows = [["", "seeds", runs.titled("start", unit), runs.titled("end", unit), "reward gained (%)",
             *(f"gained before {name} fell below 90 % of its start (%)" for name in first), "gain over control (%)",
             runs.titled("mean during training", unit), *(runs.titled(f"{name} at the end", of_name) for name, of_name in watched.items()),
             "queries to a gain of 10 %", "of 20 %", "queries", "updates", "minutes"]]
    groups, costs = by_label(lines), costs_that_differ(lines)
    rows[0] += [f"gained (%) in {name}" for name in costs]
    for label, group in groups.items():
        ends = [evaluations(line) for line in group]
        reached = []
        for gain in (0.1, 0.2):
            values = [queries_to(line, gain) for line in group]
            count = np.isfinite(values).sum()
            reached.append(cell(values, 0) if count == len(group) else f"reached by {count} of {len(group)} seeds")
        rows.append([
            label, str(len(group)), cell([reward[0] for _, reward in ends], scale=factor),
            cell([reward[-1] for _, reward in ends], scale=factor), cell([gain_percent(line) for line in group], 1),
            *(cell([gain_in_time(line) for line in group], 1) for _ in first),
            cell(gain_over_control(label, group, groups), 1), cell([mean_during_training(line) for line in group], scale=factor),
            *(cell([watched_values(line, name)[-1] for line in group], 1 if name_unit == "%" else 2, scale)
              for name, (scale, name_unit) in watched.items()),
            *reached, f"{ends[0][0][-1]:.0f}", str(group[0]["updates"]), cell([line["minutes"] for line in group], 1),
            *(cell([gain_percent(line, queries_of(line)) for line in group], 1) for queries_of in costs.values())])
    return markdown(rows)


def costs_that_differ(lines):
    """In what the runs are compared besides their ends: "1,536 queries" -> a function of a line, how many queries that is for it.

    The smallest number of queries, and of U-Net passes, that a run of the study spends; {} if all spend the same queries.
    """
    queries = [evaluations(line)[0][-1] for line in lines]
    if max(queries) == min(queries):
        return {}
    passes = min(count * passes_per_query(line) for count, line in zip(queries, lines))
    return {f"{min(queries):,.0f} queries": lambda line: min(queries),
            f"{passes:,.0f} U-Net passes": lambda line: passes / passes_per_query(line)}


def markdown(rows):
    """A table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def without_drift(lines, opposite):
    """Table of the mean gain over a reward and its opposite, seed by seed. What happens to the images under both cancels."""
    others = {(line["label"], line["seed"]): line for line in opposite}
    rows = [["", "seeds", "mean gain over both rewards (%)", "mean of the gains before the first watched reward fell below 90 % of its start (%)"]]
    for label, group in by_label(lines).items():
        pairs = [(line, others[label, line["seed"]]) for line in group if (label, line["seed"]) in others]
        if pairs:
            rows.append([label, str(len(pairs)), *(cell([(gain(one) + gain(other)) / 2 for one, other in pairs], 1)
                                                   for gain in (gain_percent, gain_in_time))])
    return markdown(rows)


def figure(lines, reward, unit, path):
    """Left: reward against queries, mean and 95 % interval. Right: reward against the first watched reward, if there is one."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    factor, watched = unit[0], watched_units(lines)
    plot = Figure(figsize=(13 if watched else 8, 4.2), layout="constrained")
    left, *right = plot.subplots(1, 2 if watched else 1, sharey=True, squeeze=False)[0]
    colors = colormaps["tab20" if len(by_label(lines)) > 10 else "tab10"].colors
    for color, (label, group) in zip(colors, by_label(lines).items()):
        queries, _ = rewards_by_epoch(group[0])
        values = factor * np.array([rewards_by_epoch(line)[1] for line in group])
        mean, half = np.array([interval(column) for column in values.T]).T
        seeds = f"{len(group)} seed{'s' * (len(group) > 1)}"
        left.plot(queries, mean, drawstyle="steps-post", color=color, label=f"{label} ({seeds})")
        left.fill_between(queries, mean - half, mean + half, step="post", color=color, alpha=0.2, linewidth=0)
        left.plot(queries[-1], mean[-1], "o", markersize=4, color=color)
        for axes, (name, (scale, _)) in zip(right, watched.items()):
            seen = scale * np.array([watched_values(line, name) for line in group])
            rewards = factor * np.array([evaluations(line)[1] for line in group])
            axes.plot(seen.mean(0), rewards.mean(0), "-", color=color)
            axes.plot(seen[:, -1], rewards[:, -1], "o", color=color)
    name = {"compressibility": "JPEG size (kB): lower is better", "incompressibility": "JPEG size (kB): higher is better"}
    left.set(xlabel="reward queries", ylabel=name.get(reward, runs.titled(reward, unit)), title="mean and 95 % interval over seeds")
    for axes, (name, of_name) in zip(right, watched.items()):
        axes.set(xlabel=runs.titled(f"watched: {name}", of_name), title="line: mean during training; points: seeds at the end")
    plot.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    runs.write_atomically(path, lambda temporary: plot.savefig(temporary, dpi=110))


def sample_rows(lines, parent, path):
    """The first fixed prompts before, and after each label's run of the first seed, one row each.

    parent: the folder of the runs. Nothing is drawn if one of their folders is gone.
    """
    first = [line for line in lines if line["seed"] == lines[0]["seed"]]
    grids = [runs.sample_files(parent / line["folder"]) for line in first]
    if all(grids):
        rows = {"before": grids[0][0], **{line["label"]: grid[-1] for line, grid in zip(first, grids)}}
        runs.write_atomically(path, runs.stack_rows([runs.first_row(grid) for grid in rows.values()], list(rows)).save)


def report(lines, reward, parent, path, command):
    """Write STUDY.md, STUDY.png and the images. Returns the table. reward: as for --reward."""
    name, unit = short_name(reward), unit_of(reward)
    figure(lines, name, unit, path.with_name(path.name + ".png"))
    images = path.with_name(path.name + "_images.png")
    sample_rows(lines, parent, images)
    commands = "\n".join(f"* {label}: `{group[0]['command']}`" for label, group in by_label(lines).items())
    made = "; ".join(sorted({f"commit {line['commit']}, {line['machine']}" for line in lines}))
    intervals = "Intervals are 95 % (Student's t) over the seeds. " if len(by_label(lines)) < len(lines) else ""
    rows = f"\n\nThe first fixed prompts, seed {lines[0]['seed']}:\n\n![images]({images.name})" if images.exists() else ""
    text = table(lines, unit)
    runs.write_text(path.with_name(path.name + ".md"), (
        f"# {path.name}: {name}\n\n`{command}`; {made}.\n\n{intervals}A gain is a share of the start. Gain over control: "
        "the gain minus that of the same epochs of RWR without a reward, seed by seed. Watched rewards are over "
        f"{lines[0]['settings']['eval_prompts']} fixed prompts. Mean during training: of the policies that drew the samples.\n\n{text}\n\n![the curves]({path.name}.png){rows}\n\n"
        f"The first seed's commands:\n\n{commands}\n"))
    return text
