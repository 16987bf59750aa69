"""Markdown of the GPU benchmarks' result files, for `bench.report`.

Each function gives the body of one README section, heading included: the section is there once
there is something to show. Rows that hold an error are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longspan.bench.shapes import SHAPES, Shape, shape_label

Content = Mapping[str, Any]
Row = Mapping[str, Any]
IMPLS = ("ours", "cudnn", "fa2", "flex")
TITLES = {"ours": "longspan", "cudnn": "cuDNN", "fa2": "FlashAttention-2",
          "flex": "FlexAttention"}


def caption(content: Content, what: str) -> str:
    """Say what was measured, on what, and when."""
    device = content["device"]
    count = f"{device['count']} x " if device["count"] > 1 else ""
    return f"{what} ({count}{device['name']}, {content['date'][:10]})\n\n"


def dated(content: Content, rows: Iterable[Row]) -> Content:
    """Return a file's head with the day of some of its rows: those that name none are of its last
    run, others may be older. Without rows it is the head's own."""
    day = max((row.get("date", content["date"]) for row in rows), default=content["date"])
    return {**content, "date": day}


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table as markdown; numbers stand to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ttft_section(contents: Sequence[Content]) -> str:
    """Time to first token: dense beside sparse."""
    text = "### A million tokens: time to the first token\n\n`longspan bench ttft`: real shapes, " \
           "random weights, DCA on, the whole engine.\n\n"
    return text + "\n".join(_ttft_table(content) for content in contents)


def _ttft_table(content: Content) -> str:
    rows = measured(content)
    body = []
    for row in sorted((row for row in rows if row["attention"] == "sparse"), key=_ttft_order):
        dense = _dense_of(row, rows)
        share = row["share"]
        body.append([
            shape_label(row),
            f"{row['num_tokens']:,}", _duration(dense), _duration(row),
            "" if dense is None else f"{dense['ttft_scaled_s'] / row['ttft_scaled_s']:.1f}x",
            f"{100 * row['density']:.1f} %", f"{row['peak_memory_gib']:.1f} GiB",
            " / ".join(f"{100 * share[name]:.0f}" for name in
                       ("linear", "selection", "attention", "rest")), f"{row['chunk_len']:,}",
            f"default: {row['plan']}" if _is_default(row) else row["plan"]])
    note = ""
    if any(row["layers"] < row["total_layers"] for row in rows):
        note = "\n* measured on the first layers only (in brackets) and scaled to all.\n"
    return caption(content, "seconds to the first token") + markdown(
        ["shape", "tokens", "dense", "sparse", "ratio", "density", "peak memory",
         "linear / selection / attention / rest, %", "prefill chunk", "budgets"], body) + note


def _ttft_order(row: Row) -> tuple[str, int, bool, str, int]:
    return (row["shape"], row["num_tokens"], not _is_default(row), row["plan"], row["chunk_len"])


def _is_default(row: Row) -> bool:
    """Return whether `generate` and `serve` run this plan; others are the bench's alone."""
    return row["shape"] in SHAPES and Shape.make(row["shape"]).plan_label == row["plan"]


def _dense_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Find the dense row to compare with: the same prompt, plain weights, most layers, then the
    fastest one, since the length of prefill chunks is each row's own."""
    found = [other for other in rows if other["attention"] == "dense"
             and "quantization" not in other
             and (other["shape"], other["num_tokens"]) == (row["shape"], row["num_tokens"])]
    return max(found, key=lambda other: (other["layers"], -other["ttft_scaled_s"]), default=None)


def _duration(row: Row | None) -> str:
    if row is None:
        return "not run"
    text = f"{row['ttft_scaled_s']:.1f} s"
    is_part = row["layers"] < row["total_layers"]
    return text + (f" * ({row['ttft_s']:.1f} s, {row['layers']} of {row['total_layers']})"
                   if is_part else "")


def decode_section(contents: Sequence[Content]) -> str:
    """Decode steps against their bytes."""
    text = "### Decoding behind a million tokens\n\n`longspan bench decode`: one step of the " \
           "whole model; the floor is its bytes (weights, keys and values) over the bandwidth of " \
           "a large copy.\n\n"
    head = ["shape", "context", "requests", "layers", "step", "floor", "step / floor",
            "KV read at", "tokens/s"]
    parts = []
    for content in contents:
        rows = sorted((row for row in measured(content) if "step_ms" in row),
                      key=lambda row: (row["shape"], row["context_len"], row["batch_size"],
                                       shape_label(row)))
        parts.append(caption(content, "decode step") + markdown(head, [
            [shape_label(row), f"{row['context_len']:,}", str(row["batch_size"]),
             f"{row['layers']}/{row['total_layers']}", f"{row['step_ms']:.2f} ms",
             f"{row['floor_ms']:.2f} ms", f"{row['over_floor']:.2f}",
             f"{row['kv_tb_per_s']:.2f} TB/s", f"{row['tokens_per_s']:,.0f}"] for row in rows]))
        parts.append(_few_rows(content))
    return text + "\n".join(filter(None, parts))


def _few_rows(content: Content) -> str:
    """Attention of 1 to 16 rows of one sequence, as the question behind a cached document has."""
    rows = [row for row in measured(content) if row.get("rows", 0) > 1]
    if not rows:
        return ""
    head = ["shape", "cached tokens", "rows of a question", "attention", "over one row"]
    return caption(content, "a question's rows") + markdown(head, [
        [shape_label(row), f"{row['context_len']:,}", str(row["rows"]),
         f"{row['attention_ms']:.2f} ms", f"{row['over_one_row']:.2f}x"]
        for row in sorted(rows, key=lambda row: (row["shape"], row["context_len"], row["rows"]))])


SERVED = (
    ("prefill", "short_ttft_max_budgets", "longest wait of a short request beside a long prompt",
     "{:.2f} step budgets"),
    ("prefill", "decode_pause_max_budgets", "longest pause of a running answer meanwhile",
     "{:.2f} step budgets"),
    ("prefill", "health_p99", "/health meanwhile, 99 of 100 within", "{:.1f} ms"),
    ("prefill", "loop_lag_p99_below", "event loop late meanwhile, 99 of 100 below", "{:.1f} ms"),
    ("prefill", "long_ttft", "first token of the long prompt meanwhile", "{:.1f} s"),
    ("followup", "followup_1_share", "a second question, of the first one's time", "{:.1f} %"),
    ("followup", "followup_2_share", "a third question, of the first one's time", "{:.1f} %"),
    *((("decode", f"tag_over_synchronous_batch_{batch}",
        f"tokens a second, run ahead over synchronous, {batch} requests", "{:.2f}x"))
      for batch in (1, 16, 64)),
    *((("decode", f"tag_idle_share_batch_{batch}",
        f"device idle between decode steps, {batch} requests", "{:.1f} %"))
      for batch in (1, 16, 64)),
    ("soak", "seconds", "mixed requests and hang-ups, longest prompts of so many tokens",
     "{:.0f} s"),
    ("soak", "finished", "of them finished", "{:,.0f}"),
    ("soak", "aborted", "hung up on", "{:,.0f}"),
    ("soak", "failed", "failed", "{:,.0f}"),
    ("soak", "loaded_from_host", "tokens that came back from host memory", "{:,.0f}"),
    ("soak", "loaded_from_disk", "tokens that came back from disk", "{:,.0f}"),
    ("soak", "leaks", "leaks of memory, descriptors, threads or blocks", "{:,.0f}"))
"""Scenario, metric, what it is, how it is written."""
OF_MACHINE = frozenset({"health_p99", "loop_lag_p99_below", "long_ttft"})
"""Plain times, shown of GPUs only; shares and ratios say more about a CPU."""


def serve_section(contents: Sequence[Content]) -> str:
    """Describe what a server's users feel."""
    text = "### A server beside long prompts\n\n`longspan bench serve`: a real server over HTTP. " \
           "A step budget is the longest step that the server allows itself " \
           "(`--step-budget-s`).\n\n"
    models = [(content, model) for content in contents
              for model in dict.fromkeys(row["model"] for row in measured(content))]
    return text + "\n".join(_serve_table(content, model) for content, model in models)


def _serve_table(content: Content, model: str) -> str:
    found = {(row["scenario"], row["metric"]): row for row in measured(content)
             if row["model"] == model}
    is_cpu = content["device"]["name"].startswith("CPU")
    body = [
        [what, f"{found[scenario, metric]['length']:,}" if scenario != "decode" else "",
         text.format(found[scenario, metric]["value"])]
        for scenario, metric, what, text in SERVED
        if (scenario, metric) in found and not (is_cpu and metric in OF_MACHINE)]
    return caption(content, f"serving {model}") + markdown(["", "tokens", "measured"], body)


def ops_section(contents: Sequence[Content]) -> str:
    """Attention ops beside PyTorch's."""
    text = "### Attention, ours beside PyTorch's\n\n`longspan bench ops`: one layer of a real " \
           "shape, random inputs, medians; nothing is timed that does not agree with the " \
           "specification. Dense rates count the causal half, sparse rates the tiles really " \
           "computed.\n\n"
    return text + "\n".join(_ops_tables(content) for content in contents)


def _ops_tables(content: Content) -> str:
    rows = measured(content)
    tables = [
        ("dense prefill, TFLOP/s", _by_impl(rows, ("dense_causal", "dense_chunk"), "tflops")),
        ("decode, one request, TB/s of keys and values", _by_impl(rows, ("decode",), "tb_per_s")),
        ("sparse prefill, one chunk", _sparse_chunks(rows)),
        ("attention of a whole prompt, selection included, one layer", _whole(rows)),
        ("Dual Chunk Attention against plain RoPE, and ceilings", _others(rows))]
    return "\n".join(caption(content, title) + table for title, table in tables if table)


def _by_impl(rows: Sequence[Row], op_names: Sequence[str], figure: str) -> str:
    chosen = [row for row in rows if row["op"] in op_names]
    impls = [impl for impl in IMPLS if any(row["impl"] == impl for row in chosen)]
    body = []
    for op in op_names:
        sizes = dict.fromkeys(
            (row["params"]["shape"], row["params"].get("num_queries", 1),
             row["params"]["context_len"]) for row in chosen if row["op"] == op)
        for shape, queries, context in sorted(sizes):
            cells = {row["impl"]: row[figure] for row in chosen if row["op"] == op and (
                row["params"]["shape"], row["params"].get("num_queries", 1),
                row["params"]["context_len"]) == (shape, queries, context)}
            best = max(cells.values())
            body.append([shape, f"{queries:,}", f"{context:,}",
                         *(_bold(cells.get(impl), best) for impl in impls)])
    head = ["shape", "queries", "keys", *(TITLES[impl] for impl in impls)]
    return markdown(head, body) if body else ""


def _bold(value: float | None, best: float) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if best < 10 else f"{value:.0f}"
    return f"**{text}**" if value == best else text


def _sparse_chunks(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["op"] == "sparse_chunk":
            params = row["params"]
            select = next((other for other in rows if other["op"] == "select"
                           and other["params"] == params), {})
            body.append([
                params["shape"], f"{params['num_queries']:,}", f"{params['context_len']:,}",
                params["content"], f"{100 * row['density']:.2f} %",
                f"{select['time_ms']:.2f} ms" if select else "",
                f"{select['workspace_mib']:.0f} MiB" if select.get("workspace_mib") else "",
                f"{row['time_ms']:.2f} ms", f"{row['tflops']:.0f}",
                f"{row['kernel_tflops']:.0f}" if "kernel_tflops" in row else "", params["plan"]])
    body.sort(key=lambda line: (line[0], line[3], _number(line[2]), line[-1]))
    head = ["shape", "queries", "keys", "content", "density", "selection", "workspace",
            "attention", "TFLOP/s", "of the kernel alone", "budgets"]
    return markdown(head, body) if body else ""


def _whole(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["op"] == "whole_sparse":
            params = row["params"]
            body.append([
                params["shape"], f"{params['num_tokens']:,}", params["content"],
                f"{row['time_ms']:,.0f} ms", f"{100 * row['selection_ms'] / row['time_ms']:.0f} %",
                f"{row['dense_ms']:,.0f} ms ({TITLES.get(row['dense_impl'], row['dense_impl'])})"
                if "dense_ms" in row else "", f"{row['ratio']:.1f}x" if "ratio" in row else "",
                f"{params['chunk_len']:,}", params["plan"]])
    body.sort(key=lambda line: (line[0], line[2], _number(line[1]), line[-1], _number(line[-2])))
    return markdown(["shape", "tokens", "content", "sparse", "of it selection", "best dense",
                     "ratio", "prefill chunk", "budgets"], body) if body else ""


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _others(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["op"].endswith("_dca_over_rope"):
            kind = row["op"].removesuffix("_chunk_dca_over_rope")
            body.append([f"DCA, {kind}, {row['params']['context_len']:,} keys",
                         f"{row['slowdown_percent']:+.1f} % time"])
        elif row["op"] == "gemm":
            body.append([f"bf16 matrix product, {row['params']['m']:,} cubed",
                         f"{row['tflops']:.0f} TFLOP/s"])
        elif row["op"] == "copy":
            body.append(["copy, read and written", f"{row['tb_per_s']:.2f} TB/s"])
    return markdown(["", "measured"], body) if body else ""


def measured(content: Content) -> list[Row]:
    """Return the rows that hold no error."""
    return [row for row in content["rows"] if "error" not in row]
