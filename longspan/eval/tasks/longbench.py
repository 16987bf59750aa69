"""LongBench (v1) from local files, with its prompts, answer lengths and metrics (THUDM, MIT).

LongBench cuts long prompts in their middle; here a prompt that does not fit is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from longspan.eval import metrics
from longspan.eval.data_files import find_file, read_lines
from longspan.eval.prompt import PLAIN, Materials
from longspan.eval.task import Answer, Example, Gold, Task, Verdict
from longspan.eval.tasks.from_files import whole_prompt

FIELDS = ("input", "context", "answers", "all_classes")
PREFIX = "longbench:"
_STORY = ("Answer the question {on}asconcisely as you can, using a single phrase if possible. Do "
          "not provide any explanation.")
_PASSAGES = ("Answer the question based on the given passages. Only give me the answer and do not "
             "output any other words.")
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question "
    "cannot be answered based on the information in the article, write \"unanswerable\". If the "
    "question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide "
    "any explanation.")
_MULTI_HOP = (f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\n"
              "Question: {input}\nAnswer:")
PROMPTS = {
    # The missing space is LongBench's own.
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a "
    f"question. {_STORY.format(on='')}\n\nStory: {{context}}\n\n"
    f"Now, {_STORY.format(on='based on the story ').replace('Answer', 'answer', 1)}\n\n"
    "Question: {input}\n\nAnswer:",
    "qasper": f"You are given a scientific article and a question. Answer the question {_ARTICLE}"
    f"\n\nArticle: {{context}}\n\n Answer the question based on the above article {_ARTICLE}\n\n"
    "Question: {input}\n\nAnswer:",
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer "
    "the following question based on the above text, only give me the answer and do not output any "
    "other words.\n\nQuestion: {input}\nAnswer:",
    "multifieldqa_zh": "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
    "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    "hotpotqa": _MULTI_HOP, "2wikimqa": _MULTI_HOP, "musique": _MULTI_HOP,
    "dureader": "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n"
    "请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the "
    "report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "You are given a meeting transcript and a query containing a question or instruction. "
    "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query "
    "based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\n"
    "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "vcsum": "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}"
    "\n\n会议总结：",
    "trec": "Please determine the type of the question below. Here are some examples of questions."
    "\n\n{context}\n{input}",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do "
    "not output any other words. The following are some examples.\n\n{context}\n\n{input}",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples."
    "\n\n{context}\n\n{input}",
    "lsht": "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be "
    "duplicates. Please carefully read these paragraphs and determine how many unique paragraphs "
    "there are after removing duplicates. In other words, how many non-repeating paragraphs are "
    "there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after "
    "removing duplicates. The output format should only contain the number, such as 1, 2, 3, and "
    "so on.\n\nThe final answer is: ",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please "
    "determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract."
    "\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer "
    "format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
    "passage_retrieval_zh": "以下是若干段落文字，以及其中一个段落的摘要。"
    "请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。"
    "答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是：",
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
MAX_TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64,
    "hotpotqa": 32, "2wikimqa": 32, "musique": 32, "dureader": 128, "gov_report": 512,
    "qmsum": 512, "multi_news": 512, "vcsum": 512, "trec": 64, "triviaqa": 32, "samsum": 128,
    "lsht": 64, "passage_count": 32, "passage_retrieval_en": 32, "passage_retrieval_zh": 32,
    "lcc": 64, "repobench-p": 64}
NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Sets that LongBench asks without a chat template."""
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
"""Sets of which only the first line of an answer counts."""
CHINESE = frozenset({"multifieldqa_zh", "dureader", "vcsum"})


@dataclass(frozen=True, kw_only=True)
class LongBenchTask(Task):
    """One of LongBench's sets."""

    dataset: str
    name: str
    max_tokens: int
    is_sized: ClassVar[bool] = False

    @classmethod
    def of(cls, dataset: str) -> LongBenchTask:
        """Make the task of a set."""
        return cls(dataset=dataset, name=PREFIX + dataset, max_tokens=MAX_TOKENS[dataset])

    @property
    def is_binary(self) -> bool:
        """Metrics are fractions."""
        return False

    def num_documents(self, num_samples: int, materials: Materials) -> int:
        """Return at most as many as the file has."""
        if self.dataset in CHINESE:
            metrics.cut_chinese("")  # missing, it should be missed before a model is loaded
        return min(num_samples, len(self._lines(materials)))

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build the prompt of a line of the file."""
        line = self._lines(materials)[index]
        frame = PLAIN if self.dataset in NO_CHAT else None
        text = PROMPTS[self.dataset].replace("{context}", line["context"])
        prompt = whole_prompt(materials, text.replace("{input}", line["input"]), self, frame)
        return [Example(prompt=prompt, question=line["input"], gold=Gold(
            answers=tuple(line["answers"]), facts={"classes": line["all_classes"] or []}))]

    def score(self, gold: Gold, answer: Answer) -> Verdict:
        """Return the best score against any of the right answers."""
        text = answer.text
        if self.dataset in FIRST_LINE:
            text = text.lstrip("\n").split("\n")[0]
        metric = metric_of(self.dataset, gold.facts.get("classes", ()))
        return Verdict(score=metrics.best(metric, text, gold.answers))

    def _lines(self, materials: Materials) -> tuple[dict[str, Any], ...]:
        file = find_file(materials.data, (f"{self.dataset}.jsonl",), self.name)
        return read_lines(file, FIELDS)


def metric_of(dataset: str, classes: Any = ()) -> Callable[[str, str], float]:
    """Return the metric of a set, as a function of prediction and right answer."""
    if dataset in ("gov_report", "qmsum", "multi_news", "samsum"):
        return metrics.rouge_l
    if dataset in ("dureader", "vcsum"):
        return _rouge_chinese
    if dataset in ("trec", "lsht"):
        return partial(metrics.classification, classes=classes)
    if dataset in ("lcc", "repobench-p"):
        return metrics.edit_similarity
    if dataset == "passage_count":
        return metrics.share_of_numbers
    if dataset.startswith("passage_retrieval"):
        return _paragraph
    cut = metrics.chinese_words if dataset in CHINESE else metrics.english_words
    return lambda prediction, answer: metrics.f1(cut(prediction), cut(answer))


def _rouge_chinese(prediction: str, answer: str) -> float:
    cut = metrics.cut_chinese
    return metrics.rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)))


def _paragraph(prediction: str, answer: str) -> float:
    return metrics.share_of_numbers(prediction, metrics.first_number(answer) or "")
