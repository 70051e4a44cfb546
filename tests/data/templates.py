"""Chat templates as well-known models have them, shortened; and what each writes around answers."""

from __future__ import annotations

_IM = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_IM_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = "{% for m in messages %}" + _IM + "{% endfor %}" + _IM_PROMPT

# the last answer gets a think block, empty without reasoning; earlier ones lose theirs
QWEN3 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% set thought = m['reasoning_content'] | default('') %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content }}{% for c in m['tool_calls'] | default([]) %}"
    "{{ '\\n' if content or not loop.first else '' }}"
    "{{ '<tool_call>\\n' + c['function'] | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m['content'] }}"
    "{{ '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}" + _IM + "{% endif %}{% endfor %}" + _IM_PROMPT
)

LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# answers follow without a generation prompt; tool calls count as no turn when roles are compared
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m['role'] != 'tool' and not m['tool_calls'] %}"
    "{% if (m['role'] == 'user') != (ns.i % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}"
    "{% if m['role'] == 'user' %}{% if tools and loop.first %}{{ tools | tojson }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'tool' %}"
    "{{ '[RESULT]' + m['content'] }}{% elif m['tool_calls'] %}"
    "{{ '[CALLS]' + m['tool_calls'] | tojson + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

# after the last turn another token than the one that ends each turn
PHI3 = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}" + _IM + "{% endif %}{% endfor %}" + _IM_PROMPT
)

# reasoning models that open the think block for the model, and drop it from what is kept
R1 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

TRANSCRIPT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

HASHES = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'] + '\\n' + m['content'] + '\\n###\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)

SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|User|>", "<|Assistant|>", "<s>", "</s>",
]  # fmt: skip
EOS = {"CHATML": "<|im_end|>", "QWEN3": "<|im_end|>", "MARKED": "<|im_end|>"}  # else </s>
