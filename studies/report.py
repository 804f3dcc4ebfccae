"""Tables and figures from the finished runs of a study. A line is one run's, in results/REWARD/STUDY.jsonl.

The policy of a run changes only when an epoch ends. So its reward is a step function of the queries. If an
epoch ends without an evaluation, its reward is interpolated.
"""
from functools import partial
from pathlib import Path

import numpy as np

from rewards import unit_of
from support.run_folder import (draw_grid, first_row, new_figure, sample_files, titled, write_atomically,
                                write_text)
from support.settings import DDPO, Config, short_name
from support.stopping import floor_of

# Student's t, two-sided 95 %, by degrees of freedom. For more, the last is a little too wide.
T_95 = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
        2.12, 2.11, 2.10]


# ---- Figures of one run ----

def config_of(line):
    """The Config of a line's settings. One that came later has its default, one that is gone is dropped."""
    known = Config.__dataclass_fields__
    return Config(**{name: value for name, value in line["settings"].items() if name in known})


def evaluations(line):
    """A run's evaluations: queries (n,) and mean reward on the fixed prompts (n,)."""
    rows = [(row["reward_queries"], row["eval_reward_mean"]) for row in line["rows"]]
    return np.array([row for row in rows if row[1] is not None], float).T


def watched_values(line, name):
    """A watched reward at the run's evaluations (n,), NaN where it is not known."""
    rows = [row["watched"] or {} for row in line["rows"] if row["eval_reward_mean"] is not None]
    return np.array([values.get(name) for values in rows], float)


def rewards_by_epoch(line):
    """Queries and reward at the end of every epoch, up to the last evaluation."""
    queries, reward = evaluations(line)
    epochs = np.array([row["reward_queries"] for row in line["rows"] if row["reward_queries"] <= queries[-1]])
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
    """Reward gained by the end, or after so many queries, in percent of the start; NaN from a start of 0."""
    at, reward = rewards_by_epoch(line)
    end = np.interp(queries, at, reward)
    return 100 * (end - reward[0]) / abs(reward[0]) if reward[0] else np.nan


def until(line, queries):
    """The line of the same run, stopped after so many queries."""
    return {**line, "rows": [row for row in line["rows"] if row["reward_queries"] <= queries]}


def judged_by(line, name, sign=1):
    """The line of the same run, evaluated by sign times a watched reward, if it has one of that name."""
    rows = [row if row["eval_reward_mean"] is None else
            {**row, "eval_reward_mean": sign * row["watched"].get(name, row["eval_reward_mean"])}
            for row in line["rows"]]
    return {**line, "rows": rows}


def gain_in_time(line):
    """The gain at the last evaluation before the first watched reward is below nine tenths of its start.

    It is what `--stop-below NAME=90%` would have left. If nothing is watched, it is the whole gain.
    """
    values = watched_values(line, next(iter(watched_units([line])), ""))
    fallen = np.nonzero(values < floor_of(values[0], 0.9))[0]
    return gain_percent(line, evaluations(line)[0][fallen[0] - 1] if len(fallen) else np.inf)


def passes_per_query(line):
    """U-Net passes that a query costs, for an image and a step each, learning included: back and forth is 3.

    They are the same on every machine, as seconds are not.
    """
    config = config_of(line)
    guided = 1 if config.guidance_scale == 1 else 2
    if config.algorithm in DDPO:
        learned, rows = config.learn_steps or config.sampling_steps - config.skip_last_steps, guided
        each = 4 if config.kl_weight else 3  # the reference policy's pass, too
    else:
        learned = config.updates_per_epoch * config.batch_size / config.samples_per_epoch
        rows = 1 if (config.training_guidance or config.guidance_scale) == 1 else 2
        each = 4 if config.algorithm == "nft" else 3  # the old policy's
    return guided * config.sampling_steps + rows * each * learned


# ---- Figures over seeds ----

def by_label(lines):
    """label -> its lines, in the order of the first."""
    return {label: [line for line in lines if line["label"] == label]
            for label in dict.fromkeys(line["label"] for line in lines)}


def interval(values):
    """Mean, and half the 95 % interval of the mean (Student's t over the seeds); NaN for one seed."""
    values, n = np.asarray(values, float), len(values)
    half = values.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return values.mean(), half * T_95[min(n, len(T_95)) - 1]


def paired(group, base, figure):
    """The figure of a label's lines minus that of the base's of the same seed."""
    base = {line["seed"]: figure(line) for line in base}
    return [figure(line) - base[line["seed"]] for line in group if line["seed"] in base]


def controls_of(figures):
    """label -> the figure of its control, "label, no reward" or the like. figures: label -> anything."""
    ends = ", no reward", ", random numbers", ", weights of 1"
    return {label.rpartition(", ")[0]: own for label, own in figures.items() if label.endswith(ends)}


def cell(values, digits=2):
    """Mean and interval as a table shows them; '-' for none."""
    mean, half = interval(values) if len(values) else (np.nan, np.nan)
    if not np.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def reached(group, gain):
    """The queries to a gain as a table shows them, if all seeds reached it."""
    values = [queries_to(line, gain) for line in group]
    count = np.isfinite(values).sum()
    return cell(values, 0) if count == len(group) else f"reached by {count} of {len(group)} seeds"


# ---- A study's table, figure and images ----

def watched_units(lines):
    """name -> unit (see rewards.unit_of) of the watched rewards that are in the runs' rows."""
    logged = {name for line in lines for row in line["rows"] for name in row["watched"] or ()}
    return {name: unit for line in lines for name, unit in line["units"].items() if name in logged}


def table(lines, unit):
    """The study in Markdown, one row a label. unit: the reward's, see rewards.unit_of."""
    def mean(figure, digits=1, factor=1.0):
        return lambda group: cell([factor * figure(line) for line in group], digits)

    groups, watched = by_label(lines), watched_units(lines)
    controls = controls_of(groups)
    columns = [  # title, and what makes a cell of a label's lines
        ("seeds", lambda group: str(len(group))),
        (titled("start", unit), mean(lambda line: evaluations(line)[1][0], 2, unit[0])),
        (titled("end", unit), mean(lambda line: evaluations(line)[1][-1], 2, unit[0])),
        ("reward gained (%)", mean(gain_percent)),
        *((f"gained before {name} fell below 90 % of its start (%)", mean(gain_in_time))
          for name in list(watched)[:1]),
        *[("gain over control (%)", lambda group: cell(
            paired(group, controls.get(group[0]["label"], []), gain_percent), 1))] * bool(controls),
        (titled("mean during training", unit), mean(mean_during_training, 2, unit[0])),
        *((titled(f"{name} at the end", own),
           mean(lambda line, name=name: watched_values(line, name)[-1], 1 if own[1] == "%" else 2, own[0]))
          for name, own in watched.items()),
        ("queries to a gain of 10 %", partial(reached, gain=0.1)), ("of 20 %", partial(reached, gain=0.2)),
        ("queries", lambda group: f"{evaluations(group[0])[0][-1]:.0f}"),
        ("updates", lambda group: str(group[0]["updates"])), ("minutes", mean(lambda line: line["minutes"])),
        *((f"gained (%) in {cost}", mean(lambda line, queries=queries: gain_percent(line, queries(line))))
          for cost, queries in costs_that_differ(lines).items())]
    return markdown(["", *(title for title, _ in columns)], [
        [label, *(cell_of(group) for _, cell_of in columns)] for label, group in groups.items()])


def costs_that_differ(lines):
    """"1,536 queries" -> a function of a line, how many queries that is for it; {} if all spend the same.

    The costs are the smallest number of queries, and of U-Net passes, that a run of the study spends.
    """
    queries = [evaluations(line)[0][-1] for line in lines]
    if max(queries) == min(queries):
        return {}
    passes = min(count * passes_per_query(line) for count, line in zip(queries, lines))
    return {f"{min(queries):,.0f} queries": lambda line: min(queries),
            f"{passes:,.0f} U-Net passes": lambda line: passes / passes_per_query(line)}


def markdown(head, rows):
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# ---- protocol.md's tables ----

def differences(lines, base, figures):
    """Table of figures of each label's runs minus the base's of the same seed. figures: title -> function."""
    groups = by_label(lines)
    return markdown(["", "seeds", *(f"{title}, minus {base}" for title in figures)], [
        [label, str(len(group)), *(cell(paired(group, groups[base], one), 1) for one in figures.values())]
        for label, group in groups.items() if label != base])


def points_gained(line, name):
    """What the trained or a watched reward gained by the end, in hundredths."""
    values = evaluations(judged_by(line, name))[1]
    return 100 * (values[-1] - values[0])


def queries_to_a_fifth(line):
    """Queries to a gain of 20 %; all, if it never gained so much."""
    queries = queries_to(line, 0.2)
    return queries if np.isfinite(queries) else evaluations(line)[0][-1]


def both(lines, opposite, figure):
    """label -> seed -> that figure of a line under each reward. opposite: lines with the other sign."""
    others = {(line["label"], line["seed"]): line for line in opposite}
    return {label: {line["seed"]: np.array([figure(line), figure(others[label, line["seed"]])])
                    for line in group if (label, line["seed"]) in others}
            for label, group in by_label(lines).items()}


def scores(lines, opposite):
    """Table of the sweep, best first: the mean over both rewards and all seeds of the gain in time."""
    gains = both(lines, opposite, gain_in_time)
    score = {label: np.mean([*seeds.values()]) for label, seeds in gains.items() if seeds}
    return markdown(["", "score (%)", "compressibility, by seed", "incompressibility, by seed"], [
        [label, f"{score[label]:.1f}", *(
            ", ".join(f"{gain[k]:.1f}" for gain in gains[label].values()) for k in (0, 1))]
        for label in sorted(score, key=lambda label: (label.partition(":")[0], -score[label]))])


def comparison(lines, opposite, queries, base="rwr"):
    """Table of what is gained after so many queries, on each reward and on the mean.

    A drift cancels in the mean of the gains, not of those in time. The last columns are differences, paired
    by seed: the gain in time minus the base's, and the gain minus the control's, whose gains cancel, too.
    """
    def cells(pairs):  # (2,) of each seed
        return [cell(values, 1) for values in ([one for one, _ in pairs], [other for _, other in pairs],
                                               [np.mean(pair) for pair in pairs])]

    def minus(some, others):
        return cells([one - others[seed] for seed, one in some.items() if seed in others])

    cut = [[until(line, queries) for line in some] for some in (lines, opposite)]
    gains, in_time, animals = (both(*cut, figure) for figure in (
        gain_percent, gain_in_time, lambda line: 100 * watched_values(line, "animal")[-1]))
    controls = controls_of(gains)
    rows = [[label, str(len(seeds)), *cells(gains[label].values()), *cells(seeds.values()),
             *cells(animals[label].values())[:2],
             *minus(seeds, in_time[base]), *minus(gains[label], controls.get(label, {}))[:2]]
            for label, seeds in in_time.items()]
    rewards = ["smaller", "larger", "mean"]
    titles = (("gain (%)", rewards), ("in time (%)", rewards), ("`animal` (%)", rewards[:2]),
              (f"in time, minus {base}", rewards), ("gain, minus its control", rewards[:2]))
    return markdown(["", "seeds", *(f"{title}: {one}" for title, some in titles for one in some)], rows)


def figure(lines, reward, unit, path):
    """Left: evaluations against queries, mean and 95 % interval. Right: against the first watched reward."""
    groups, watched = by_label(lines), list(watched_units(lines).items())[:1]
    plot = new_figure(13 if watched else 8, 4.2)
    from matplotlib import colormaps
    left, *right = plot.subplots(1, 1 + len(watched), sharey=True, squeeze=False)[0]
    n, several = len(groups), any(len(group) > 1 for group in groups.values())
    colors = colormaps["tab10"].colors if n <= 10 else colormaps["turbo"](np.linspace(0, 1, n))
    for color, (label, group) in zip(colors, groups.items()):
        queries = evaluations(group[0])[0]
        values = unit[0] * np.array([evaluations(line)[1] for line in group])
        mean, half = np.array([interval(column) for column in values.T]).T
        left.plot(queries, mean, ".-", color=color, label=f"{label}, seeds: {len(group)}")
        left.fill_between(queries, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        for axes, (name, own) in zip(right, watched):
            seen = own[0] * np.array([watched_values(line, name) for line in group])
            axes.plot(seen.mean(0), mean, ".-", color=color)
            axes.plot(seen[:, -1], values[:, -1], "o", color=color)
            axes.set(xlabel=titled(f"watched: {name}", own),
                     title="lines: evaluations; large: seeds at the end")
    left.set(xlabel="reward queries", ylabel=titled(reward, unit),
             title="evaluations, mean and 95 % interval over seeds" if several else "evaluations of one seed")
    plot.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    write_atomically(path, lambda temporary: plot.savefig(temporary, dpi=110))


def report(lines, reward, parent, path, command):
    """Write STUDY.md, STUDY.png and, if the first seed's folders are in `parent`, STUDY_images.png.

    The images are the first fixed prompts before, and after each label's run. Returns the table.
    """
    name, unit, images = short_name(reward), unit_of(reward), Path(f"{path}_images.png")
    figure(lines, name, unit, Path(f"{path}.png"))
    first = [line for line in lines if line["seed"] == lines[0]["seed"]]
    grids = [sample_files(parent / line["folder"]) for line in first]
    if all(grids):
        strips = [first_row(grid) for grid in (grids[0][0], *(grid[-1] for grid in grids))]
        labels = ["before", *(line["label"] for line in first)]
        write_atomically(images, draw_grid(strips, labels, columns=1, width=strips[0].width).save)
    text, made = table(lines, unit), {f"commit {line['commit']}, {line['machine']}" for line in lines}
    write_text(Path(f"{path}.md"), "\n\n".join([
        f"# {path.name}: {name}", f"`{command}`; {'; '.join(sorted(made))}.",
        "Intervals are 95 % (Student's t) over the seeds. A gain is a share of the start. Gain over control: "
        "the gain minus that of the same training without the reward, seed by seed. Watched rewards are "
        f"over {lines[0]['settings']['eval_prompts']} fixed prompts. Mean during training: of the policies "
        "that drew the samples. Between evaluations rewards are interpolated.", text,
        f"![the curves]({path.name}.png)",
        *["The first fixed prompts, first seed:", f"![images]({images.name})"] * images.exists(),
        "The first seed's commands:", "\n".join(f"* {one['label']}: `{one['command']}`" for one in first)]))
    return text
