"""Chat template: puts the embedding prompt into every conversation, after its image or its text.

Other tools know a prompt only as a prefix or as a system message. Ours stands behind the content and depends on what
the content is, so the exported template decides: it rewrites the user's messages and hands them to the checkpoint's own
template, which stays word for word. It leaves nothing to the caller: vLLM neither asks for the generation prompt nor
adds the token that begins a text, unless it is told to.
"""

from __future__ import annotations

import json

REWRITE = """\
{%- set rewritten = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- if message.content is string -%}
      {%- set parts = [{'type': 'text', 'text': message.content}] -%}
    {%- else -%}
      {%- set parts = message.content -%}
    {%- endif -%}
    {%- set images = parts | rejectattr('type', 'equalto', 'text') | list -%}
    {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') | trim -%}
    {%- set prompt = IMAGE_PROMPT if images else TEXT_PROMPT -%}
    {%- set asked = text ~ '\\n' ~ prompt if text or not images else prompt -%}
    {%- set content = images + [{'type': 'text', 'text': asked}] -%}
    {%- set rewritten.messages = rewritten.messages + [{'role': 'user', 'content': content}] -%}
  {%- else -%}
    {%- set rewritten.messages = rewritten.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = rewritten.messages -%}
{%- set add_generation_prompt = true -%}
"""


def embedding_chat_template(template: str, image_prompt: str, text_prompt: str, begin: str = "") -> str:
    """The checkpoint's own Jinja template, preceded by a rewriting of the user's messages.

    begin: the token that stands before everything, where the template leaves it to the tokenizer.

    An image is followed by `image_prompt`, a text by a newline and `text_prompt`; a text beside an image stands
    between the image and `image_prompt`. Soft prompts are the names of their tokens.
    """
    rewrite = REWRITE.replace("IMAGE_PROMPT", json.dumps(image_prompt)).replace("TEXT_PROMPT", json.dumps(text_prompt))
    return rewrite + (f"{{{{- {json.dumps(begin)} }}}}" if begin else "") + template
