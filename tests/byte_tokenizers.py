# Copyright © 2026 MLX Contributors

"""Tokenizers with a token for each byte, and chat templates."""


from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its generation prompt holds an empty thought that finished answers don't have.
THINKING = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif",
)
STRICT = "{{ raise_exception('roles must alternate') if messages[0].role != 'user' }}"


def make_backends():
    """Tokenizers whose ids may depend on where a piece of text stands."""
    chars = sorted({*map(chr, range(32, 127)), *"\n▁éü"})
    merges = [("▁", "t"), ("▁t", "w"), ("h", "i"), ("\n", "\n"), ("▁", "▁")]
    vocab = {c: i for i, c in enumerate([*chars, *("".join(m) for m in merges), "?"])}
    for scheme in ("first", "always", "never"):
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="?"))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        yield bpe.to_str()
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    yield bpe.to_str()
    unigram = Tokenizer(
        models.Unigram([(t, -len(vocab) + i) for t, i in vocab.items()], 0)
    )
    unigram.normalizer = normalizers.Lowercase()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    yield unigram.to_str()
    yield make_tokenizer().backend_tokenizer.to_str()


USER = [{"role": "user", "content": "Hi"}]


def make_tokenizer(template=None, bos=False, kind=PreTrainedTokenizerFast):
    """A tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = kind(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(list(map(int, ids)))


BACKENDS = list(make_backends())


PLAIN = {"chosen": " yes", "rejected": " no"}


def pair(prompt="Q:", chosen=" yes", rejected=" no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
