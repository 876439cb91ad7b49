"""What a search found: a table, ``result.json``, ``tune.csv`` and the settings for a server."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp.eval.tune.bounds import samples_needed
from uncomp.eval.tune.options import Options
from uncomp.eval.tune.race import IN, OUT, Outcome
from uncomp.eval.tune.search import best, closest, pareto
from uncomp.eval.tune.settings_file import write_settings
from uncomp.eval.tune.speed import Comparison, Rate
from uncomp.eval.tune.users import Pool


@dataclass(frozen=True)
class Result:
    """A finished search.

    Attributes:
        options: of it.
        facts: of the run's folder (machine, versions, engine, data).
        outcomes: every setting that was tried, in order.
        full: mean score with the full cache, of ``full_n`` samples.
        samples: there are.
        speeds: by name of the setting.
        longest: tokens of the longest prompt.
        cut: prompts that were too long for the model and lost tokens from the middle.
    """

    options: Options
    facts: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    full: float
    full_n: int
    samples: int
    speeds: Mapping[str, Comparison]
    longest: int
    cut: int = 0

    @property
    def chosen(self) -> Outcome | None:
        """The smallest setting that is within the limit."""
        return best(self.outcomes)

    @property
    def user_tokens(self) -> int:
        return self.options.user_tokens or self.longest

    def pool(self) -> Pool | None:
        """The blocks that users share; None where the engine does not say its blocks."""
        engine = self.facts.get("engines", [{}])[-1]
        size, per_token = engine.get("block_size"), self.facts.get("kv_bytes_per_token")
        if size is None or per_token is None:
            return None
        if self.options.kv_memory is not None:
            return Pool.of_memory(self.options.kv_memory, per_token, size)
        return Pool(engine["blocks"] - 1, size)

    def rows(self) -> list[dict[str, Any]]:
        """A row per setting, the full cache first; scores and losses in points of 100."""
        front = pareto(self.outcomes)
        return [self._full_row(), *(self._row(o, o in front) for o in self.outcomes)]

    def _full_row(self) -> dict[str, Any]:
        pool = self.pool()
        return {
            "setting": "full cache",
            "kept": 1.0,
            "bytes_per_token": self.facts.get("kv_bytes_per_token"),
            "score": 100 * self.full,
            "loss": 0.0,
            "samples": self.full_n,
            "users": None if pool is None else pool.users(self.user_tokens),
        }

    def _row(self, outcome: Outcome, on_front: bool) -> dict[str, Any]:
        setting, loss, pool = outcome.setting, outcome.loss, self.pool()
        speed = self.speeds.get(setting.name)
        per_token = self.facts.get("kv_bytes_per_token")
        return {
            "setting": setting.name,
            "policy": setting.policy,
            "pooling": setting.pooling,
            "window": setting.window,
            "keep": setting.keep,
            "kept": outcome.keep,
            "bytes_per_token": None if per_token is None else outcome.keep * per_token,
            "score": 100 * outcome.own,
            "full_score": 100 * outcome.full,
            "loss": 100 * loss.mean,
            "loss_lower": 100 * loss.lower,
            "loss_upper": 100 * loss.upper,
            "loss_upper_corrected": None if outcome.corrected is None else 100 * outcome.corrected,
            "bound": loss.how,
            "samples": loss.n,
            "looks": outcome.looks,
            "early": outcome.early,
            "verdict": outcome.verdict,
            "pareto": on_front,
            "chosen": outcome is self.chosen,
            **_rate("tokens_per_s", speed.own if speed else None),
            **_rate("full_tokens_per_s", speed.full if speed else None),
            "users": None if pool is None else pool.users(self.user_tokens, setting.config()),
        }

    def write(self, folder: Path) -> None:
        """Write ``result.json``, ``tune.csv``, ``table.md`` and, if there is one, the settings."""
        rows = self.rows()
        document = {
            "options": {
                **_jsonable(dataclasses.asdict(self.options)),
                "space": dataclasses.asdict(self.options.space),
            },
            "facts": dict(self.facts),
            "rows": rows,
            "settings_tried": len(self.outcomes),
            "chosen": self.chosen and self.chosen.setting.name,
        }
        _replace(folder / "result.json", json.dumps(document, indent=1) + "\n")
        _replace(folder / "table.md", self.markdown())
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with open(folder / "tune.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if self.chosen is not None:
            write_settings(folder / "settings.yaml", self.chosen, self._notes(self.chosen))

    def markdown(self) -> str:
        """The front and what must be known to read it."""
        shown = [row for row in self.rows() if row.get("pareto", True)]
        lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "---:|" * 5 + "---|---:|---:|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in shown]
        return "\n".join([*lines, "", *(f"- {line}" for line in self._remarks()), ""])

    def _remarks(self) -> list[str]:
        rules, tried = self.options.rules, self.outcomes
        chosen = self.chosen
        lines = [self._verdict_line(chosen)]
        counts = {verdict: sum(o.verdict == verdict for o in tried) for verdict in (IN, OUT)}
        lines.append(
            f"{len(tried)} settings were compared with the full cache: {counts[IN]} within the "
            f"limit, {counts[OUT]} above it, {len(tried) - sum(counts.values())} not shown; "
            f"{sum(o.early for o in tried)} were decided before the last sample. The table has the "
            f"{len(pareto(tried))} that no other beats in both size and loss; tune.csv has all."
        )
        lines.append(
            f"Loss: points of 100, full less setting on the same samples, with one-sided bounds at "
            f"{1 - rules.level:.4g} each ({self.options.confidence:g} for {rules.looks} looks at "
            f"the data, Bonferroni); {', '.join(sorted({o.loss.how for o in tried}))}."
        )
        lines.append(self._users_line())
        if self.speeds:
            speed = next(iter(self.speeds.values()))
            lines.append(
                f"Decode tokens/s of {speed.batch} requests at a time, median (20 % to 80 % of "
                f"{speed.own.repeats}), and the full cache's median in the same alternation: "
                f"compare within a row."
            )
        if self.cut:
            lines.append(
                f"{self.cut} prompts were longer than the model's window and lost tokens from the "
                f"middle."
            )
        if all(outcome.keep >= 1 for outcome in tried):
            lines.append(
                f"Nothing was ever dropped: prompts have at most {self.longest} tokens, and those "
                f"below min_tokens={tried[0].setting.config().min_tokens} are never compressed."
            )
        if 100 * self.full <= self.options.max_loss:
            lines.append(
                f"The full cache itself scores {100 * self.full:.1f}: with that, no loss above "
                f"{self.options.max_loss:g} can be seen. These samples decide nothing."
            )
        return lines

    def _verdict_line(self, chosen: Outcome | None) -> str:
        limit, rules = self.options.max_loss, self.options.rules
        if chosen is None:
            near = closest(self.outcomes)
            needed = samples_needed(rules.limit, rules.level)
            few = (
                f" With {self.samples} samples and scores of 0 or 1 nothing can be shown: "
                f"{needed} are needed."
                if self.samples < needed
                else ""
            )
            return (
                f"No setting is shown to lose less than {limit:g}. Closest: {near.setting.name}, "
                f"loss {100 * near.loss.mean:.2f}, at most {100 * near.loss.upper:.2f}.{few}"
            )
        corrected = 100 * (chosen.corrected if chosen.corrected is not None else chosen.loss.upper)
        holds = "still below" if corrected < limit else "not below"
        return (
            f"Chosen: {chosen.setting.name}, the smallest shown to lose less than {limit:g} (at "
            f"most {100 * chosen.loss.upper:.2f}). Being the best of {len(self.outcomes)}, it may "
            f"have been lucky: the bound that allows for that is {corrected:.2f}, {holds} the "
            f"limit."
        )

    def _users_line(self) -> str:
        pool = self.pool()
        if pool is None:
            return "Users: the engine does not say its blocks."
        where = "the engine's own pool" if self.options.kv_memory is None else "the given memory"
        return (
            f"Users: requests of {self.user_tokens} tokens that fit {where} ({pool.blocks} blocks "
            f"of {pool.block_size} tokens) together, the last of them still in its prefill."
        )

    def _notes(self, chosen: Outcome) -> list[str]:
        options, versions = self.options, self.facts.get("versions", {})
        data = ", ".join(f"{d['name']} {d['sha256'][:16]}" for d in self.facts.get("data", []))
        tasks = options.data.name if options.data else ", ".join(options.tasks)
        return [
            f"uncomp tune, {self.facts.get('date')}: {self.facts.get('model')} on {tasks}",
            f"data: {data}",
            f"score {100 * chosen.own:.2f}, full cache {100 * chosen.full:.2f}, on "
            f"{chosen.loss.n} samples",
            f"loss {100 * chosen.loss.mean:.2f}, at most {100 * chosen.loss.upper:.2f} "
            f"({options.confidence:g}, {chosen.loss.how}); limit {options.max_loss:g}",
            f"allowing for the choice among {len(self.outcomes)} settings: at most "
            f"{100 * (chosen.corrected or 0):.2f}",
            f"kept {chosen.keep:.4f} of the KV bytes, measured",
            ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        ]


_HEAD = (
    "setting",
    "kept",
    "bytes/token",
    "score",
    "loss (bounds)",
    "samples",
    "verdict",
    "tokens/s",
    "users",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    bounds = ""
    if "loss_lower" in row:
        bounds = f" ({row['loss_lower']:.2f} to {row['loss_upper']:.2f})"
    name = f"**{row['setting']}**" if row.get("chosen") else row["setting"]
    speed = "-"
    if row.get("tokens_per_s") is not None:
        ends = f"{row['tokens_per_s_low']:.4g} to {row['tokens_per_s_high']:.4g}"
        speed = f"{row['tokens_per_s']:.4g} ({ends})"
        if "full_tokens_per_s" in row:
            speed += f", full {row['full_tokens_per_s']:.4g}"
    return [
        name,
        f"{row['kept']:.3f}",
        "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.0f}",
        f"{row['score']:.2f}",
        f"{row['loss']:.2f}{bounds}",
        str(row["samples"]),
        row.get("verdict", ""),
        speed,
        "-" if row["users"] is None else str(row["users"]),
    ]


def _rate(name: str, rate: Rate | None) -> dict[str, Any]:
    if rate is None:
        return {name: None}
    return {name: rate.median, f"{name}_low": rate.low, f"{name}_high": rate.high}


def _jsonable(value: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in value.items()}


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
