"""The scheduler's process. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import zmq

from longspan import garbage
from longspan.engine.control.scheduler import Scheduler
from longspan.engine.processes.child_orders import Orders
from longspan.engine.processes.serving_loop import ServingLoop
from longspan.engine.processes.sockets import Inbox, Outbox, RunnerTransport
from longspan.engine.processes.wire import Begin, ToScheduler, last_words


def run(orders: Orders) -> int:
    """Wait for `Begin`, then schedule until the parent lets go. Returns the exit status."""
    context: zmq.Context[Any] = zmq.Context()
    front = Outbox(context, orders.address("front"))
    runner = Outbox(context, orders.address("runner"))
    try:
        inbox = Inbox(context, orders.address("scheduler"), ToScheduler)
        while not isinstance(begin := inbox.get(), Begin):
            pass
        most = orders.max_in_flight
        config = begin.config if most > 1 else replace(begin.config, burst_s=0.0)
        if config.num_stages > 1 < most:
            most = max(most, config.num_stages + 1)  # a step for each stage, and the next one
        transport = RunnerTransport(inbox, runner, most)
        garbage.freeze()
        ServingLoop(Scheduler(config), transport, transport.command, front.put).run()
        return 0
    except BaseException as error:
        front.put(last_words(error))
        return 1
    finally:
        context.destroy()  # waits until the messages have left
