"""Conversations in short."""


def talk(*contents):
    """Messages of "role: content" each, the role by its first letter."""
    roles = {role[0]: role for role in ("system", "user", "assistant", "tool")}
    parts = [each.split(": ", 1) for each in contents]
    return [{"role": roles[role], "content": said} for role, said in parts]
