"""What a server tells of sparse prefill and of cached prefixes: usage and metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from longspan.engine.prefix_origin import PrefixOrigin
from longspan.engine.recall import Recall
from longspan.serve.generation import Usage
from longspan.serve.metrics import Metrics
from longspan.serve.replies import UsageReply


def test_recall_is_absent_where_nothing_was_sparse() -> None:
    assert "attention_recall" not in Usage(arrived_s=0.0).as_dict()


def test_recall_of_several_prompts_counts_tokens() -> None:
    usage = Usage(arrived_s=0.0, recalls=[Recall(0.9, 0.6, 300), Recall(0.5, 0.2, 100)])
    found: dict[str, Any] = usage.as_dict()
    assert found["attention_recall"] == {"typical": 0.8, "scouts": 0.5, "num_tokens": 400}
    UsageReply.model_validate(found)
    usage.recalls = [Recall(0.9, None, 300)]
    assert usage.as_dict()["attention_recall"] == {"typical": 0.9, "num_tokens": 300}


def test_metrics_observe_each_request_that_was_sparse() -> None:
    gate: Any = SimpleNamespace(backlog_s=lambda: 0.0)
    metrics = Metrics(gate, lambda: gate)
    metrics.finished(Usage(arrived_s=0.0))
    metrics.finished(Usage(arrived_s=0.0, recalls=[Recall(0.93, 0.7, 10)]))
    samples = {(sample.name, *sample.labels.values()): sample.value
               for metric in metrics._recall.collect() for sample in metric.samples}
    name = "longspan_attention_recall"
    assert samples[f"{name}_count", "typical"] == samples[f"{name}_count", "scouts"] == 1
    assert samples[f"{name}_sum", "typical"] == 0.93 and samples[f"{name}_sum", "scouts"] == 0.7


def test_usage_and_metrics_say_where_a_prefix_came_from() -> None:
    gate: Any = SimpleNamespace(backlog_s=lambda: 0.0)
    metrics, usage = Metrics(gate, lambda: gate), Usage(arrived_s=0.0, cached_tokens=500)
    assert usage.as_dict()["prompt_tokens_details"] == {"cached_tokens": 500}
    usage.origins = [PrefixOrigin(num_host_tokens=300, load_s=0.25),
                     PrefixOrigin(num_disk_tokens=100, load_s=0.5)]
    found = usage.as_dict()
    assert found["prompt_tokens_details"] == {
        "cached_tokens": 500, "host_tokens": 300, "disk_tokens": 100, "load_ms": 500.0}
    UsageReply.model_validate(found)
    metrics.finished(usage)
    samples = {(sample.name, *sample.labels.values()): sample.value
               for metric in (*metrics._loaded.collect(), *metrics._load.collect())
               for sample in metric.samples}
    assert samples["longspan_loaded_tokens_total", "disk"] == 100
    assert samples["longspan_loaded_tokens_total", "host"] == 300
    assert samples["longspan_prefix_load_seconds_sum",] == 0.75
