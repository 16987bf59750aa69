"""Asking in the name of one sample, and remembering the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.data.calls import Calls, Reply
from longspan.data.instruct.prompts import Prompt


@dataclass(slots=True)
class Asker:
    """Asks in the name of one job and remembers the steps."""

    calls: Calls
    job: str
    seed: int
    steps: list[dict[str, str]] = field(default_factory=list)
    """Prompt with its version, and the call's name, of each step in order."""

    def ask(
        self, prompt: Prompt, max_tokens: int, temperature: float = 0.0,
        example: tuple[str, str] | None = None, /, **values: object,
    ) -> Reply:
        """Return the reply to a prompt with its values filled in.

        Args:
            example: an earlier turn, what was asked for and the reply.
        """
        messages = [] if example is None else [
            {"role": "user", "content": example[0]}, {"role": "assistant", "content": example[1]}]
        messages.append({"role": "user", "content": prompt.fill(values)})
        name, reply = self.calls.reply(self.job, messages, max_tokens, temperature, self.seed)
        self.steps.append({"prompt": prompt.label, "call": name})
        return Reply(reply.text.strip(), reply.is_cut)
