"""A tokenizer whose words are letters and digits."""

from __future__ import annotations

WORDS = ["<unk>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", "ab"]


def make_tokenizer():
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=4
    )
