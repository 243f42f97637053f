"""A worker on the unmodified `autogen-http-runtime`, as a program.

    python autogen_agents.py URL TYPE=BEHAVIOUR … [--instance TYPE/KEY=BEHAVIOUR]
                             [--subscribe TOPIC:AGENT] [--subscribe-prefix PREFIX:AGENT]

Prints `ready` when it serves, and `began` when an agent that never answers got a message.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass

from autogen_core import (
    AgentId,
    BaseAgent,
    MessageContext,
    TypePrefixSubscription,
    TypeSubscription,
    try_get_known_serializers_for_type,
)
from autogen_http_runtime.runtimes.http import HttpWorkerAgentRuntime


@dataclass
class Text:
    content: str


def runtime_at(url: str) -> HttpWorkerAgentRuntime:
    runtime = HttpWorkerAgentRuntime(url)
    runtime.add_message_serializer(try_get_known_serializers_for_type(Text))
    return runtime


class Scripted(BaseAgent):
    """Does what its behaviour says. An event is remembered; `heard` tells what was."""

    def __init__(self, behaviour: str):
        super().__init__(behaviour)
        self.behaviour = behaviour
        self.heard: list[str] = []

    async def on_message_impl(self, message: Text, ctx: MessageContext):
        if not ctx.is_rpc:
            self.heard.append(f"{ctx.topic_id.type}/{ctx.topic_id.source}: {message.content}")
            return None
        match self.behaviour:
            case "reverse":
                return Text(message.content[::-1])
            case "upper":
                return Text(message.content.upper())
            case "fail":
                raise ValueError(f"cannot do {message.content}")
            case "listen":
                return Text("\n".join(self.heard))
            case "who":
                return Text(f"{self.id} for {ctx.sender}")
            case "hang":
                print("began", flush=True)
                await asyncio.sleep(3600)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("agents", nargs="*")
    parser.add_argument("--instance", action="append", default=[])
    parser.add_argument("--subscribe", action="append", default=[])
    parser.add_argument("--subscribe-prefix", action="append", default=[])
    args = parser.parse_args()

    runtime = runtime_at(args.url)
    for agent in args.agents:
        agent_type, behaviour = agent.split("=")
        await runtime.register_factory(agent_type, lambda b=behaviour: Scripted(b))
    await runtime.start()
    for instance in args.instance:
        agent_id, behaviour = instance.split("=")
        # The package cannot subscribe a second instance of a type: it takes the host's refusal of
        # the same subscription for a failure.
        await Scripted(behaviour).register_instance(
            runtime, AgentId.from_str(agent_id), skip_direct_message_subscription=True
        )
    for flag, make in (
        (args.subscribe, TypeSubscription),
        (args.subscribe_prefix, TypePrefixSubscription),
    ):
        for subscription in flag:
            topic, agent_type = subscription.split(":")
            await runtime.add_subscription(make(topic, agent_type))
    print("ready", flush=True)
    await runtime.stop_when_signal()


if __name__ == "__main__":
    asyncio.run(main())
