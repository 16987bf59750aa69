"""Markdown of what several GPUs take, and would take, for `bench.report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pipeline_rows import measured_rows
from bench.tables import Content, Row, markdown
from longspan.bench.pipeline.simulate import BEST

PLANS = (("fixed 8192", "pp, 8K"), ("fixed 32768", "pp, 32K"), (BEST, "pp, best fixed"))
"""Plan and heading of the columns before the plan of each kind of attention."""


def pipeline_section(contents: Sequence[Content]) -> str:
    """Time to the first token on several GPUs, measured, then simulated."""
    return "\n".join(filter(None, [
        *map(_measured, contents), *map(_decoded, contents), *map(_together, contents),
        *map(_simulated, contents)]))


def _measured(content: Content) -> str:
    """One line for each prompt and arrangement: the best fixed chunk, what is planned, and what one
    rank's steps let expect."""
    rows = measured_rows(content["rows"])  # of several ladders the longest one is shown
    if not rows:
        return ""
    body = []
    keys = sorted(
        {(row["shape"], row["attention"], row["num_tokens"], row["cp"], row["pp"], row["tp"])
         for row in rows}, key=_order)
    for key in keys:
        own = {row["plan"]: row for row in rows if tuple(
            row[name] for name in ("shape", "attention", "num_tokens", "cp", "pp", "tp")) == key}
        shape, attention, num_tokens, *ranks = key
        label = _ranks(*ranks)
        best, planned = own.get(BEST), own.get("ladder") or own.get("planned")
        told = planned or best
        body.append([
            f"{shape}, {attention}, {num_tokens:,}{_part(next(iter(own.values())))}", label,
            *(_measured_cell(own.get(plan)) for plan in ("fixed 8192", "fixed 32768")),
            _measured_cell(best), _measured_cell(planned),
            *(f"{told[name]:.2f} s" if told and name in told else "–"
              for name in ("predicted_s", "simulated_s")),
            f"{100 * told['step_error']:.0f} %" if told else "–"])
    return (f"Measured on {content['device']['name']} ({content['date'][:10]}). In each cell: "
            "seconds to the first token, speed-up over one rank by the same plan, and the share of "
            "the time in which ranks computed no step.\n\n" + markdown(
                ["shape, attention, tokens", "ranks", "8K", "32K", "best fixed",
                 "planned / ladder", "predicted", "simulated", "steps off by"], body))


def _order(key: tuple[str, str, int, int, int, int]) -> tuple[Any, ...]:
    """Sort by shape, sparse ones first, by length, then one rank, cp, pp, tp."""
    shape, attention, num_tokens, *sizes = key
    return shape, attention != "sparse", num_tokens, sizes[::-1]


def _part(row: Row) -> str:
    """Say where not all layers were computed."""
    is_part = row["layers"] < row["total_layers"]
    return f" ({row['layers']} of {row['total_layers']} layers)" if is_part else ""


def _ranks(*sizes: int) -> str:
    """Name an arrangement of cp, pp and tp."""
    return " x ".join(f"{name} {size}" for name, size in zip(
        ("cp", "pp", "tp"), sizes, strict=True) if size > 1) or "one"


def _decoded(content: Content) -> str:
    """List a step of one request behind each context, by arrangement."""
    rows = [row for row in content["rows"] if row["source"] == "decode" and "error" not in row]
    if not rows:
        return ""
    return "Steps of one request behind a context, two under way.\n\n" + markdown(
        ["shape, tokens", "ranks", "step", "alone", "KV"], [
            [f"{row['shape']}, {row['num_tokens']:,}", _ranks(row["cp"], row["pp"], row["tp"]),
             f"{row['step_ms']:.2f} ms", f"{row['sync_step_ms']:.2f} ms",
             "divided" if row["divides_kv"] else "whole"] for row in rows])


def _together(content: Content) -> str:
    """List when prompts that were handed in together had their first tokens."""
    rows = [row for row in content["rows"] if row["source"] == "users" and "error" not in row]
    if not rows:
        return ""
    return "Prompts handed in together: when each had its first token.\n\n" + markdown(
        ["shape, attention, tokens", "ranks", "first tokens", "KV"], [
            [f"{row['shape']}, {row['attention']}, {row['users']} x {row['num_tokens']:,}",
             _ranks(row["cp"], row["pp"], row["tp"]),
             ", ".join(f"{each:.2f} s" for each in row["ttft_each_s"]),
             "divided" if row["divides_kv"] else "whole"] for row in rows])


def _measured_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    gain = f", {row['speedup']:.2f}x" if "speedup" in row else ""
    best = f" ({row['chunk_len']:,})" if "chunk_len" in row else ""
    return f"{row['ttft_s']:.2f} s{gain}, {100 * row['idle']:.0f} %{best}"


def _simulated(content: Content) -> str:
    rows = [row for row in content["rows"] if row["source"] == "simulated"]
    if not rows:
        return ""
    device = content["device"]["name"].removeprefix("simulated ")
    text = (f"Simulated from rows of one {device} ({content['date'][:10]}), not measured on "
            "several. In each cell: seconds to the first token, speed-up over one GPU with chunks "
            "of 32,768, and the share of the time for which GPUs wait.\n\n")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        for count in sorted({_count(row) for row in own} - {1}):
            text += f"**{shape}, {count} GPUs**\n\n" + _table(own, count) + "\n"
    return text + _rates(content)


def _table(rows: Sequence[Row], count: int) -> str:
    mixed = count >= 8 and any(row["tp"] == 2 and row["cp"] == count // 2 for row in rows)
    has_tp = any(row["tp"] == count for row in rows)
    has_rows = count >= 4 and any(
        (row["cp"], row["pp"], row["tp"]) == (count // 2, 2, 1) for row in rows)
    head = ["attention, tokens", "one GPU, 32K / best", "cp, 32K", "cp, best chunk",
            *(title for _, title in PLANS), "pp, planned / ladder", *["tp, best chunk"] * has_tp,
            *[f"cp {count // 2} x pp 2, planned / ladder"] * has_rows,
            *[f"cp {count // 2} x tp 2, best", f"pp {count // 2} x tp 2, planned / ladder"] * mixed]
    keys = sorted({(row["attention"], row["num_tokens"]) for row in rows},
                  key=lambda key: (key[0] != "sparse", key[1]))
    body = []
    for attention, num_tokens in keys:
        own = {(row["cp"], row["pp"], row["tp"], row["plan"]): row for row in rows
               if (row["attention"], row["num_tokens"]) == (attention, num_tokens)}
        plan = "ladder" if attention == "sparse" else "planned"
        one = [own[1, 1, 1, name] for name in ("fixed 32768", BEST)]
        cells = [f"{attention}, {num_tokens:,}", " / ".join(f"{row['ttft_s']:.2f}" for row in one)]
        cells += [_cell(own[count, 1, 1, name]) for name in ("fixed 32768", BEST)]
        cells += [_cell(own[1, count, 1, name]) for name, _ in PLANS]
        cells.append(_cell(own[1, count, 1, plan]))
        if has_tp:
            cells.append(_cell(own[1, 1, count, BEST]))
        if has_rows:
            cells.append(_cell(own[count // 2, 2, 1, plan]))
        if mixed:
            cells.append(_cell(own[count // 2, 1, 2, BEST]))
            cells.append(_cell(own[1, count // 2, 2, plan]))
        body.append(cells)
    return markdown(head, body)


def _cell(row: Row) -> str:
    best = f" ({row['chunk_len']:,})" if "chunk_len" in row else ""
    return f"{row['ttft_s']:.2f} s, {row['speedup']:.2f}x, {100 * row['idle']:.0f} %{best}"


def _rates(content: Content) -> str:
    """List the constants of the simulation and where they come from."""
    body = []
    for item in content["rates"]:
        for name, rate in item["rates"].items():
            values = rate["value"] if isinstance(rate["value"], list) else [rate["value"]]
            body.append([item["shape"], f"`{name}`", ", ".join(f"{v:.4g}" for v in values),
                         rate["from"]])
    body += [["all", f"`{name}`", f"{value:.4g}", "assumed"]
             for name, value in content["assumed"].items()]
    return "Constants of the simulation:\n\n" + markdown(
        ["shape", "constant", "value", "from"], body)


def _count(row: Mapping[str, Any]) -> int:
    return int(row["cp"] * row["pp"] * row["tp"])
