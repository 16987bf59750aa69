"""LV-Eval from local files: eleven sets at five lengths (infinigence/LVEval, MIT).

As its program scores, not as its README says: ignored words count in the recall of key words only,
and of several right answers the first one counts. Prompts that do not fit are an error, not cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from longspan.eval import metrics
from longspan.eval.data_files import find_file, read_lines
from longspan.eval.prompt import Materials
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.from_files import whole_prompt

FIELDS = ("input", "context", "answers")
PREFIX = "lveval:"
LEVELS = ("16k", "32k", "64k", "128k", "256k")
"""Words of a prompt, about."""
_ONE = ("Please answer the following question based on the {given} passages. Questions and answers "
        "are only relevant to one passage. Only give me the answer and do not output any other "
        "explanation and evidence.\n\n")
_ONE_PASSAGE = (f"{_ONE.format(given='given')}Article: {{context}}\n\n"
                f"{_ONE.format(given='above')}Question: {{input}}\nAnswer:")
_SOME = ("nswer the {which}question based on the {given} passages. Questions and answers are only "
         "relevant to some passages. Only give me the answer and do not output any other "
         "explanation and evidence.\n\n")
_ONE_ZH = "问题和答案只与其中一篇文章有关。"
_ONLY_ZH = "只需要直接给出问题的答案，不要输出其他任何解释和证据。"
PROMPTS = {
    "hotpotwikiqa_mixup": f"A{_SOME.format(which='', given='given')}Article: {{context}}\n\n"
    f"Please a{_SOME.format(which='following ', given='above')}Question: {{input}}\nAnswer:",
    "loogle_SD_mixup": _ONE_PASSAGE, "loogle_CR_mixup": _ONE_PASSAGE,
    "loogle_MIR_mixup": _ONE_PASSAGE, "multifieldqa_en_mixup": _ONE_PASSAGE,
    "multifieldqa_zh_mixup": f"请阅读以下文章并用中文回答问题，{_ONE_ZH}{_ONLY_ZH}\n\n"
    "文章：{context}\n\n"
    f"请基于上面的文章回答下面的问题，{_ONE_ZH}{_ONLY_ZH}\n\n问题：{{input}}\n回答：",
    "factrecall_en": "Please answer the following questions based on the given article.\n\n"
    "Article: {context}\n\nPlease answer the following questions based on the above article.\n\n"
    "Question: {input}\nAnswer:",
    "factrecall_zh": "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n"
    "现在请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    "cmrc_mixup": f"请根据下面给定的文章回答问题，{_ONE_ZH}\n\n文章：{{context}}\n\n"
    f"现在请基于上述文章回答下面的问题，{_ONE_ZH}\n\n问题：{{input}}\n回答：",
    "lic_mixup": f"请根据下面给定的文章回答问题，{_ONE_ZH}\n\n文章：{{context}}\n\n"
    f"请现在基于上述文章回答下面的问题，{_ONE_ZH}\n\n问题：{{input}}\n回答：",
    "dureader_mixup": f"请根据下面给定的文章回答问题，{_ONE_ZH}\n\n文章：{{context}}\n\n"
    f"现在请基于上述文章回答下面的问题，{_ONE_ZH}\n\n问题：{{input}}\n回答：",
}
UNGATED = frozenset({"factrecall_en", "factrecall_zh"})
ENGLISH = frozenset({"hotpotwikiqa_mixup", "loogle_SD_mixup", "loogle_CR_mixup",
                     "loogle_MIR_mixup", "multifieldqa_en_mixup", "factrecall_en"})
MIN_RECALL = {True: 0.2, False: 0.4}
"""The least recall of the key words, in English and in Chinese: with less an answer scores
nothing."""
_IGNORED_ENGLISH = """
    and to of in her was with for it from is that his he by she they or at because be on are their
    what as had were about being this who but have has when which does
"""
_IGNORED_CHINESE = """
    的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指
    法 会 元 主要 以及 通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到
    一定 用于 但 使用 让 具有 并 亿元 万元 上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条
    受 已经 带 度
"""
IGNORED_ENGLISH = frozenset(_IGNORED_ENGLISH.split())
IGNORED_CHINESE = frozenset(_IGNORED_CHINESE.split())


@dataclass(frozen=True, kw_only=True)
class LvEvalTask(Task):
    """One set at one length."""

    dataset: str
    level: str
    name: str
    max_tokens: int
    is_sized: ClassVar[bool] = False

    @classmethod
    def of(cls, dataset: str, level: str) -> LvEvalTask:
        """Make the task of a set at a length."""
        return cls(dataset=dataset, level=level, name=f"{PREFIX}{dataset}_{level}",
                   max_tokens=16 if dataset in UNGATED else 64)

    @property
    def is_binary(self) -> bool:
        """Metrics are fractions."""
        return False

    def num_documents(self, num_samples: int, materials: Materials) -> int:
        """Return at most as many as the file has."""
        if self.dataset not in ENGLISH:
            metrics.cut_chinese("")  # missing, it should be missed before a model is loaded
        return min(num_samples, len(self._lines(materials)))

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build the prompt of a line of the file."""
        line = self._lines(materials)[index]
        text = PROMPTS[self.dataset].replace("{context}", line["context"])
        prompt = whole_prompt(materials, text.replace("{input}", line["input"]), self)
        return [Example(prompt=prompt, question=line["input"], gold=Gold(
            answers=tuple(line["answers"]), facts={"keywords": line.get("answer_keywords")}))]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Score F1, nothing without enough of the key words; ROUGE-L for one set."""
        right, keywords = gold.answers[0], gold.facts.get("keywords")
        if self.dataset == "dureader_mixup":
            return Verdict(score=metrics.rouge_l(_kept(answer.text), _kept(right)))
        is_english = self.dataset in ENGLISH
        cut = metrics.english_words if is_english else metrics.chinese_words
        said = cut(answer.text)
        if self.dataset not in UNGATED and (keywords or not is_english):
            recall = metrics.keyword_recall(
                said, cut(keywords or right), IGNORED_ENGLISH if is_english else IGNORED_CHINESE)
            if recall < MIN_RECALL[is_english]:
                return Verdict(score=0.0, label="key words missing")
        return Verdict(score=metrics.f1(said, cut(right)))

    def _lines(self, materials: Materials) -> tuple[dict[str, Any], ...]:
        names = (f"{self.dataset}_{self.level}.jsonl",
                 f"{self.dataset}/{self.dataset}_{self.level}.jsonl")
        return read_lines(find_file(materials.data, names, self.name), FIELDS)


def _kept(text: str) -> str:
    """Return Chinese words with spaces between, ignored ones left out."""
    return " ".join(word for word in metrics.chinese_words(text) if word not in IGNORED_CHINESE)
