"""Small tokenizers, trained when they are asked for, with chat templates that behave as well-known published ones."""

import functools
import json
from typing import Any

LINES = [
    "You are a helpful assistant. Answer in one word, and say why you think so.",
    "What is the weather like in Oslo today? Take a coat, it rains.",
    "user assistant system model tool tools function name arguments city response think call result",
    "The capital of France is Paris. Hello there, how are you? I am fine, thank you.",
    '{"name": "weather", "arguments": {"city": "Oslo"}} {"type": "function", "parameters": {}}',
    "Yes\nNo\n\nMaybe\n\n\nNever  ever   again",
    "a\n\nb\n\nc\n\nd\n\ne",
]

# --- templates, each in words of our own

CHATML = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a small helpful assistant.<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
        {%- set f = m.tool_calls[0].function %}
        {{- '{"name": ' + f.name | tojson + ', "parameters": ' + f.arguments | tojson + '}' }}
    {%- else %}
        {%- if m.role == 'system' and tools %}{{ 'Tools: ' + tools | tojson + '\\n\\n' }}{% endif %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' + m.content | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_MISTRAL = """\
{{- bos_token }}
{%- set said = namespace(system='', user=-1, first=-1) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set said.system = m.content %}{% endif %}
    {%- if m.role == 'user' %}{% set said.user = loop.index0 %}{% endif %}
    {%- if m.role == 'user' and said.first < 0 %}{% set said.first = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == said.user %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if said.system and WHERE %}{{ said.system + '\\n\\n' }}{% endif %}
        {{- m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] ' + m.tool_calls | map(attribute='function') | list | tojson + eos_token }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- elif m.role != 'system' %}{{ raise_exception('only user, assistant, system and tool roles') }}
    {%- endif %}
{%- endfor %}"""
MISTRAL = _MISTRAL.replace("WHERE", "loop.index0 == said.first")
MISTRAL_LAST = _MISTRAL.replace("WHERE", "loop.last")
"""A system message is written only before a user's message that ends the chat."""

QWEN3 = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set asked.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- set said = m.content %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > asked.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}{{ said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or said %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

R1 = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- else %}{{ m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

DATED = (
    "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    + CHATML[CHATML.index("\n{%- for") :]
)

# --- tokenizers


def _wrapped(inner: Any, template: str | None, eos: str, bos: str | None, adds_bos: bool, special: list[str]) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if adds_bos:
        at = inner.token_to_id(bos)
        inner.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, at)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=special[0], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def _added(special: list[str], plain: list[str], **options: Any) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(token, special=token in special, normalized=False, **options) for token in [*special, *plain]]


WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+"
"""Line ends stay together, as in the tokenizers of Llama 3 and Qwen."""


@functools.cache
def byte_level(
    template: str | None,
    special: tuple[str, ...],
    eos: str,
    bos: str | None = None,
    adds_bos: bool = False,
    plain: tuple[str, ...] = (),
    rstrip: bool = False,
) -> Any:
    """A byte-level BPE with these special tokens, and added ones that are not special (``plain``)."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    inner = Tokenizer(BPE())
    words = Split(Regex(WORDS), "isolated")
    inner.pre_tokenizer, inner.decoder = (
        Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)]),
        Decoder(),
    )
    trainer = BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    inner.train_from_iterator(LINES * 3, trainer)
    inner.add_tokens(_added(list(special), list(plain), rstrip=rstrip))
    return _wrapped(inner, template, eos, bos, adds_bos, list(special))


SPACE = "\u2581"
SPACES: dict[str, dict[str, Any]] = {
    "prepend": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        }
    },
    "first": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
    },
    "none": {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}},
}
"""Where a SentencePiece tokenizer puts a space of its own: before every text between special tokens (legacy Llama and
Mistral), before a text that begins the whole (later ones), or nowhere (Gemma)."""


@functools.cache
def sentence_piece(
    template: str | None,
    special: tuple[str, ...],
    eos: str,
    bos: str | None = None,
    adds_bos: bool = True,
    spaces: str = "prepend",
) -> Any:
    """A BPE over letters, with bytes for those that it has not, as SentencePiece makes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import BpeTrainer

    learnt = Tokenizer(BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = Metaspace(replacement=SPACE)
    trainer = BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"], initial_alphabet=[SPACE])
    learnt.train_from_iterator([word for line in LINES for word in line.split("\n")] * 3, trainer)
    content = json.loads(learnt.to_str())
    content["added_tokens"] = []
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    content |= {"normalizer": None, "pre_tokenizer": None} | SPACES[spaces]
    content["decoder"] = {"type": "Sequence", "decoders": decoders}
    inner = Tokenizer.from_str(json.dumps(content))
    inner.add_tokens(_added(list(special), []))
    return _wrapped(inner, template, eos, bos, adds_bos, list(special))


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
INST = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def chatml() -> Any:
    """SmolLM2's: a system message of its own where there is none; no BOS."""
    return byte_level(CHATML, IM, "<|im_end|>", bos="<|im_start|>")


def llama3() -> Any:
    """Llama 3's: BOS by the template and by the tokenizer."""
    return byte_level(LLAMA3, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True)


def gemma() -> Any:
    """Gemma's: BOS by the template and the tokenizer; a turn ends in a token that is not EOS."""
    return sentence_piece(GEMMA, TURNS, "<eos>", bos="<bos>", spaces="none")


def mistral(template: str = MISTRAL, spaces: str = "first") -> Any:
    """Mistral's: BOS by the template and the tokenizer; its markers are special tokens."""
    return sentence_piece(template, INST, "</s>", bos="<s>", spaces=spaces)


def qwen3() -> Any:
    """Qwen 3's: no BOS; the tags of thoughts and of tools are tokens, but not special ones."""
    return byte_level(QWEN3, IM, "<|im_end|>", plain=THINK)


def r1() -> Any:
    """DeepSeek R1's: asks for a reply by an opened thought, and writes replies without theirs."""
    return byte_level(R1, ("<pad>", "<s>", "<eos>", "<|User|>", "<|Assistant|>"), "<eos>", "<s>", True, plain=THINK)


def dated() -> Any:
    """A template that writes the date."""
    return byte_level(DATED, IM, "<|im_end|>")


FAMILIES = {"chatml": chatml, "llama3": llama3, "gemma": gemma, "mistral": mistral, "qwen3": qwen3}
EOT = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
}
BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>"}


# --- messages


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def call(content: Any = "", city: str = "Oslo", **fields: Any) -> dict[str, Any]:
    """A message that calls a tool."""
    function = {"name": "weather", "arguments": {"city": city}}
    return bot(content, tool_calls=[{"type": "function", "function": function}], **fields)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
