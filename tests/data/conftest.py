"""A tiny byte-level tokenizer in a folder: every byte is a token, so nothing is unknown and lengths can be counted."""

from __future__ import annotations

import json

import pytest
import tiny

# DEFAULT inserts a system message of its own, as SmolLM2's template does
DEFAULT = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# NO_SYSTEM knows no system message and says so, as Gemma's does
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"
)


TEMPLATES = {"default": DEFAULT, "no_system": NO_SYSTEM, None: None}


@pytest.fixture
def save_tokenizer(tmp_path):
    """save(template, generation_config) -> the folder; template: a key of TEMPLATES."""

    def save(template=None, generation_config=None):
        folder = tmp_path / "model"
        tiny.save_tokenizer(folder, TEMPLATES[template], end="<|endoftext|>")
        if generation_config is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation_config))
        return folder

    return save
