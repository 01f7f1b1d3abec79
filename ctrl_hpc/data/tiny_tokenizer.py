"""The tiny world's tokenizer: Qwen2's, with a small vocabulary in which the usual clauses are tokens of their own.

A clause ends at a semicolon, at a full stop or colon before white space, or at the end of a line. The clauses that the
tiny world says again and again (the steps of problems, the lines of programs, the headings of critiques) become added
tokens, which are found before Qwen2's splitting into words; what is left is byte-level BPE. So a problem is about 7
tokens, a program 10 and a critique 14, and any other text can still be written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

VOCABULARY = 448
"""Tokens, special and added ones included; divisible by 4 so that tensor-parallel ranks share it evenly."""
CLAUSE_SHARE = 0.0005
"""Clauses that make up at least this share of all clauses become tokens."""
MAX_LENGTH = 512
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CLAUSE = re.compile(r"\n?(?:[^\n;.:]|[.:](?!\s|$))+(?:;|[.:](?=\s|$)|\n)?|\n|;|[.:]")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """A tokenizer fitted to rendered chats; raises ValueError when they hold too little for the vocabulary."""
    parts = [part for text in texts for part in re.split(r"<\|im_\w+\|>", text) if part]
    counts = Counter(clause for part in parts for clause in CLAUSE.findall(part))
    least = CLAUSE_SHARE * counts.total()
    clauses = sorted(clause for clause, count in counts.items() if count >= least and len(clause) > 1)
    special = [END_OF_TEXT, TURN_START, TURN_END]
    words = VOCABULARY - len(clauses)
    vocabulary, merges = _train_bpe(sorted(counts), special, words)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(clause, normalized=False, special=False) for clause in clauses])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"tiny tokenizer: {len(tokenizer)} tokens learnt, {VOCABULARY} wanted; give it more texts")
    return tokenizer


def _train_bpe(texts: Sequence[str], special: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level BPE under Qwen2's splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer(vocab={END_OF_TEXT: 0}, merges=[]).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
