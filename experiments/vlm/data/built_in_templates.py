"""The chat templates that need no file.

chatml, llama3   with the models' own tokens around each turn
vicuna_v1        LLaVA-1.5's (Liu et al., 2023): words for roles, an answer ends as a document does
plain            its first phase: images, the answer and a line break; what was asked is left out
"""

from experiments.vlm.data.jinja_template import TemplateFile

# What a message says; its content is a string, or a list of texts and images.
SAID = """{% macro said(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}{{ image_token }}{%- else -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
CHATML = TemplateFile(
    SAID
    + """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ said(message) + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ said(message) + '<|im_end|>' }}
{%- endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    control=("<|im_start|>", "<|im_end|>"),
)
LLAMA3 = TemplateFile(
    SAID
    + """{{ bos_token }}{% for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ said(message) | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ said(message) | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = TemplateFile(
    SAID
    + """{{ bos_token }}{% if messages[0].role != 'system' %}{{ "SYSTEM " }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ said(message) + ' ' }}
{%- elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}
{%- generation %}{{ said(message) + eos_token }}{% endgeneration %}
{%- else %}{{ message.role | upper + ': ' + said(message) + ' ' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""".replace("SYSTEM", SYSTEM),
    control=(),
)
PLAIN = TemplateFile(
    SAID
    + """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ said(message) + '\\n' }}{% endgeneration %}
{%- else %}{{ image_token * (said(message) | string).count(image_token) }}
{%- endif %}
{%- endfor %}""",
    control=(),
    answers_alone=True,
)
BUILT_IN = {"chatml": CHATML, "llama3": LLAMA3, "vicuna_v1": VICUNA, "plain": PLAIN}
