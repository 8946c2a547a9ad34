"""Conversations in short."""

from minimind_nb.data.conversations import Chat


def talk(*contents):
    """Messages of "role: content" each, the role by its first letter."""
    roles = {role[0]: role for role in ("system", "user", "assistant", "tool")}
    parts = [each.split(": ", 1) for each in contents]
    return [{"role": roles[role], "content": said} for role, said in parts]


def chat(messages, first=0):
    """A conversation whose answers count in the loss from message `first` on."""
    roles = [message["role"] for message in messages]
    return Chat(
        messages, [n >= first and r == "assistant" for n, r in enumerate(roles)]
    )
