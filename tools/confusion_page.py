"""The page docs/confusion.md, from what tools/confusion.py found."""

from __future__ import annotations

from typing import NamedTuple

from llama3np.crosscheck import mutations

PARTS = {"full": "full traces", "logits": "logits alone"}
INTRODUCTION = """# Injected against named

Written by `python tools/confusion.py --peers PYTHON`. Each row of the table is a mistake made in transformers' Llama, in its classes, weights or config ([mistakes.py](../tools/injections/mistakes.py)); captured with [transformers_capture.py](../tools/capture/transformers_capture.py); and diagnosed by `llama3np diagnose`, once from a full trace and once from its logits alone. No mistake is made with the means by which `diagnose` makes its own.

Models: stories260K and SmolLM2-135M (Q4_1 widened to float32), and two of random weights with llama3 scaling, an untied head and 12 or 3 layers. Mistakes of the cache are made in runs that decode their last 6 tokens; those of 16 bits in models of 16 bits; everything else in float32.
"""  # noqa: E501


class Result(NamedTuple):
    """What came of one case. rank: 1 for the first of those ranked; 0 if it is not among them."""

    mistake: str
    form: str
    model: str
    part: str
    status: str
    verdict: str | None
    rank: int
    alike: list[str]
    invisible: bool

    @property
    def named(self) -> bool:
        """Whether the diagnosis begins with the mistake that was made."""
        return self.verdict == self.mistake

    @property
    def equal(self) -> bool:
        """Whether it is named after another one that gives the same numbers."""
        return self.mistake in self.alike and not self.named

    @property
    def missed(self) -> bool:
        """Whether the mistake shows, and is not named."""
        return not (self.named or self.equal or self.invisible)


def page(found: list[Result]) -> str:
    """The whole page."""
    made = [each for each in found if not each.mistake.startswith("right-")]
    right = [each for each in found if each.mistake.startswith("right-")]
    lines = [INTRODUCTION, *summary(made), *coverage(made), *blamed(right), *table(made)]
    return "\n".join([*lines, *untouched(right)]) + "\n"


def summary(made: list[Result]) -> list[str]:
    """How many were named."""
    lines = [
        "| from | made | named first | named second to an equal | invisible | missed |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for part, words in PARTS.items():
        of = [each for each in made if each.part == part]
        hidden = sum(each.invisible and not each.named for each in of)
        counts = [len(of), sum(e.named for e in of), sum(e.equal for e in of), hidden]
        lines.append(f"| {words} | {' | '.join(map(str, counts))} | {sum(e.missed for e in of)} |")
    return [
        *lines,
        "",
        "*Equal*: another mistake gives the same numbers, as silu(up) * gate does, whether code or "
        "files are swapped, where only logits are seen; both are listed. *Invisible*: the numbers "
        "are those of a right run, or within its rounding.",
        "",
    ]


def coverage(made: list[Result]) -> list[str]:
    """Which of the mistakes that diagnose knows were made."""
    listed = {each.mistake for each in made}
    absent = [id for id in mutations.table() if id not in listed]
    words = f"Not made: {', '.join(absent)}." if absent else ""
    total = len(mutations.table())
    return [
        f"{total - len(absent)} of the {total} that `diagnose --list` has were made. {words}",
        "",
    ]


def blamed(right: list[Result]) -> list[str]:
    """Whether anything was said of the correct runs."""
    runs = {(each.mistake, each.model) for each in right}
    wrongly = {(each.mistake, each.model) for each in right if each.status != "agrees"}
    return [f"Of {len(runs)} correct runs {len(wrongly)} were blamed for anything.", ""]


def table(made: list[Result]) -> list[str]:
    """A row for every mistake and model."""
    lines = [
        "| made | in | named from the full trace | rank | named from logits alone | rank |",
        "|---|---|---|--:|---|--:|",
    ]
    rows: dict[tuple[str, str, str], dict[str, Result]] = {}
    for each in made:
        rows.setdefault((each.mistake, each.form, each.model), {})[each.part] = each
    for (mistake, form, model), parts in sorted(rows.items()):
        name = f"{mistake} ({form})" if form else mistake
        cells = [f"{cell(parts[part])} | {parts[part].rank or '-'}" for part in PARTS]
        lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
    return lines


def cell(each: Result) -> str:
    """What was said; bold where the mistake was missed."""
    words = each.verdict or ("invisible" if each.invisible else each.status)
    words += f", as well {', '.join(each.alike)}" if each.alike else ""
    return f"**{words}**" if each.missed else words


def untouched(right: list[Result]) -> list[str]:
    """A row for every correct run."""
    lines = ["", "## Correct runs", "", "Every second one decodes its second half.", ""]
    lines += ["| run | in | full trace | logits alone |", "|---|---|---|---|"]
    for name, model in sorted({(each.mistake, each.model) for each in right}):
        of = {e.part: e.verdict or e.status for e in right if (e.mistake, e.model) == (name, model)}
        run = name.removeprefix("right-").replace("-", ", prompt ")
        lines.append(f"| {run} | {model} | {of['full']} | {of['logits']} |")
    return lines
