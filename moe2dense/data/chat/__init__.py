"""Render conversations in a chat template and mark the tokens to learn.

Messages, tools and a tokenizer with a template come in; token ids and a mask of the assistant's words go out.
"""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from moe2dense.data.chat.conversation import Conversation, conversation_of
    from moe2dense.data.chat.samples import ChatSample, chat_samples
    from moe2dense.data.chat.template import ChatTemplate

__all__ = ["ChatSample", "ChatTemplate", "Conversation", "chat_samples", "conversation_of"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    submod_attrs={
        "conversation": ["Conversation", "conversation_of"],
        "samples": ["ChatSample", "chat_samples"],
        "template": ["ChatTemplate"],
    },
)
