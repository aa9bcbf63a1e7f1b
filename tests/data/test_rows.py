"""Rows of questions and chats: what is taken, how it is written for a model, and what losses count of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import save_pico, texts, word_tokenizer, write_jsonl
from srmu.data.rows import CountedText, render_chat
from srmu.data.sources import RowSource, Source, read_counted, read_texts
from srmu.data.tokens import batch_rows, encode_texts, read_ids
from srmu.data.topics import TopicConfig, load_topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.runs.config import make_config
from srmu.runs.estimate import plan_dry_run
from srmu.runs.run import run_notes, unlearn_config

# as many models have it: a mark for each turn, and what makes the assistant speak
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM, ASK, SAY = "Be short.", "Where is Accra?", "In Ghana, on the coast."
SHORT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]
LONG = [{"role": "system", "content": SYSTEM}, *SHORT, {"role": "user", "content": "And Kumasi?"},
        {"role": "assistant", "content": "Inland."}]  # fmt: skip
SHARED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]
PLAIN = f"User: {ASK}\nAssistant: {SAY}"
FORMS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "question and answer": ({"question": ASK, "answer": SAY}, f"Question: {ASK}\nAnswer: {SAY}", [SAY]),
    "instruction and output": ({"instruction": ASK, "input": "", "output": SAY}, PLAIN, [SAY]),
    "messages": ({"messages": SHORT, "id": 3}, PLAIN, [SAY]),
    "conversations": ({"conversations": SHARED}, PLAIN, [SAY]),
    "prompt and completion": ({"prompt": ASK, "completion": f" {SAY}"}, f"{ASK} {SAY}", [f" {SAY}"]),
}  # fmt: skip


def counted_parts(text: str) -> list[str]:
    assert isinstance(text, CountedText)
    return [text[start:end] for start, end in text.spans]


def bytes_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Bytes merged into pieces, the space before a word in its first one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return train_pieces(tokenizer, trainers.BpeTrainer, pre_tokenizers.ByteLevel.alphabet(), **special)


def sentence_pieces(**special: Any) -> PreTrainedTokenizerFast:
    """As SentencePiece has them: a mark in place of spaces, the first word's too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return train_pieces(tokenizer, trainers.UnigramTrainer, [*map(chr, range(32, 127)), "\n"], **special)


def train_pieces(tokenizer: Tokenizer, trainer: Any, alphabet: list[str], **special: Any) -> PreTrainedTokenizerFast:
    marks = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    how = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    told = [f"user assistant system Question: Answer: User: Assistant: {ASK} {SAY} {SYSTEM} And Kumasi? Inland."] * 9
    own = trainer(vocab_size=330, special_tokens=marks, initial_alphabet=alphabet, show_progress=False, **how)
    tokenizer.train_from_iterator(told, own)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **special)


TOKENIZERS = {"bytes": bytes_tokenizer, "sentence pieces": sentence_pieces}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_told_by_its_columns(form: str, tmp_path: Path) -> None:
    row, plain, answers = FORMS[form]
    write_jsonl_rows(tmp_path / "a.jsonl", [row])
    (text,) = read_texts([Source(path=str(tmp_path / "a.jsonl"))])
    assert (text, counted_parts(text), getattr(text, "taken", None)) == (plain, answers, form)


def test_a_text_comes_first_and_a_column_that_is_named(tmp_path: Path) -> None:
    row = {"text": "w1 w2", "question": ASK, "answer": SAY}
    assert read_texts([RowSource(path="rows", rows=[row])]) == ["w1 w2"]
    assert read_texts([RowSource(path="rows", rows=[row], column="answer")]) == [SAY]


def test_more_of_instructions_and_of_chats() -> None:
    rows = [
        {"instruction": "Name it.", "input": "Ghana", "output": "Accra"},
        {"messages": LONG},
        {"prompt": SHORT[:1], "completion": SHORT[1:]},
        {"messages": [SHORT[0], {"role": "assistant", "content": [{"type": "text", "text": SAY}]}]},
    ]
    found = read_texts([RowSource(path="rows", rows=rows)])
    assert found[0] == "User: Name it.\n\nGhana\nAssistant: Accra"
    assert found[1].startswith(f"System: {SYSTEM}\nUser: ")
    assert counted_parts(found[1]) == [SAY, "Inland."]
    assert found[2] == found[3] == f"User: {ASK}\nAssistant: {SAY}"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_counted_is_the_answer(kind: str, form: str) -> None:
    """Prompt and answer are tokenised together; counted tokens are the answer again, and its end."""
    (text,) = read_texts([RowSource(path="rows", rows=[FORMS[form][0]])])
    for template in (None, CHATML):
        tokenizer = TOKENIZERS[kind](chat_template=template)
        ((ids, counted),) = encode_texts([text], tokenizer, 512)
        assert ids == read_ids(text, tokenizer)
        answer = tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
        written = template and form != "prompt and completion"
        assert answer.strip() == (f"{SAY}<|im_end|>" if written else SAY)
        assert ids.count(tokenizer.bos_token_id) == (0 if written else 1)
        if written:
            turns = [turn._asdict() for turn in getattr(text, "turns", ())]
            assert ids == tokenizer.apply_chat_template(turns, return_dict=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_each_answer_of_a_chat_is_counted(kind: str) -> None:
    tokenizer = TOKENIZERS[kind](chat_template=CHATML)
    (text,) = read_texts([RowSource(path="rows", rows=[{"messages": LONG}])])
    assert isinstance(text, CountedText)
    whole = render_chat(text, tokenizer)
    assert counted_parts(whole) == [f"{SAY}<|im_end|>\n", "Inland.<|im_end|>\n"]
    ((ids, counted),) = encode_texts([text], tokenizer, 512)
    starts = [i for i in range(1, len(counted)) if counted[i] > counted[i - 1]]
    assert len(starts) == 2
    (batch,) = batch_rows([ids], tokenizer, 1, "mask", [counted])
    assert (batch["labels"][0] != -100).tolist() == counted
    (plain,) = read_texts([RowSource(path="rows", rows=[{"messages": LONG}], plain=True)])
    assert read_ids(plain, tokenizer) == tokenizer(str(plain))["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [None, CHATML])
def test_of_a_cut_chat_only_answers_count(kind: str, template: str | None) -> None:
    """Wherever it is cut, in a question too, what is counted is what was counted of the whole."""
    tokenizer = TOKENIZERS[kind](chat_template=template)
    (text,) = read_texts([RowSource(path="rows", rows=[{"messages": LONG}])])
    ((ids, counted),) = encode_texts([text], tokenizer, 512)
    for length in range(counted.index(True) + 1, len(ids)):
        ((cut, marks),) = encode_texts([text], tokenizer, length)
        assert (cut, marks) == (ids[:length], counted[:length])


def test_of_a_prompt_of_messages_no_answer_counts() -> None:
    row = {"prompt": LONG[:4], "completion": LONG[4:]}
    (text,) = read_texts([RowSource(path="rows", rows=[row])])
    assert counted_parts(text) == ["Inland."]
    assert isinstance(text, CountedText)
    assert counted_parts(render_chat(text, bytes_tokenizer(chat_template=CHATML))) == ["Inland.<|im_end|>\n"]


def test_what_a_template_adds_at_the_very_end() -> None:
    tokenizer = bytes_tokenizer(chat_template=CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    (text,) = read_texts([RowSource(path="rows", rows=[{"messages": LONG}])])
    assert isinstance(text, CountedText)
    assert counted_parts(render_chat(text, tokenizer)) == [f"{SAY}<|im_end|>\n", "Inland.<|im_end|>\n</s>"]


def test_a_template_that_tells_the_date_tells_the_same_every_day() -> None:
    tokenizer = bytes_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }} " + CHATML)
    (text,) = read_texts([RowSource(path="rows", rows=[{"messages": SHORT}])])
    assert isinstance(text, CountedText)
    assert render_chat(text, tokenizer).startswith("26 Jul 2024 <|im_start|>")


def test_cells_that_hold_nothing_and_lists_as_text() -> None:
    rows = [
        {"text": None, "messages": json.dumps(SHORT)},
        {"messages": None, "question": ASK, "answer": SAY},
        {"instruction": ASK, "input": " ", "output": SAY},
    ]
    found = read_texts([RowSource(path="rows", rows=rows)])
    assert [getattr(text, "taken", "") for text in found] == [
        "messages",
        "question and answer",
        "instruction and output",
    ]
    with pytest.raises(SrmuError, match="'text' is NoneType, expected a string"):
        read_texts([RowSource(path="rows", rows=[{"text": None, "id": 3}])])


def test_padding_that_counts_counts_where_all_of_a_text_does() -> None:
    rows = [[1, 5, 6, 7], [1, 8]]
    (batch,) = batch_rows(rows, word_tokenizer(), 2, "count", [[True] * 4, [True] * 2])
    assert batch["labels"].equal(batch["input_ids"])


def test_a_template_that_writes_earlier_turns_otherwise() -> None:
    template = "{% for m in messages %}{{ '(thought)' if loop.last }}{{ m.content }}|{% endfor %}"
    tokenizer = bytes_tokenizer(chat_template=template)
    chat, pair = read_texts([RowSource(path="rows", rows=[{"messages": LONG}, {"messages": SHORT}])])
    with pytest.raises(SrmuError, match=r"rows: row 1: .*when others follow it.* plain: true"):
        encode_texts([chat], tokenizer, 512)
    strict = bytes_tokenizer(chat_template="{{ raise_exception('no system') if messages[0].role == 'system' }}")
    with pytest.raises(SrmuError, match=r"rows: row 1: this model's chat template cannot write the row \(no system"):
        encode_texts([chat], strict, 512)
    for broken in ("{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", {"tool_use": CHATML}):
        with pytest.raises(SrmuError, match=r"rows: row 1: .* cannot write the row .* set plain: true"):
            encode_texts([chat], bytes_tokenizer(chat_template=broken), 512)
    assert pair


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": SHORT[:1]}, "messages: the last message is by user; expected an answer by assistant"),
        ({"messages": [SHORT[1]]}, "messages: message 1 is by assistant, and nothing comes before it"),
        ({"messages": [*SHORT, SHORT[1]]}, "message 3 is by assistant, after one by assistant"),
        ({"messages": [*SHORT, LONG[0]]}, "message 3 is by system, after one by assistant"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is by 'tool', expected one of system, user"),
        ({"messages": [SHORT[0], {"role": "assistant", "content": " "}]}, "the message 2 is empty"),
        ({"messages": [SHORT[0], {"role": "assistant", "content": None}]}, "is NoneType, expected a string"),
        ({"messages": [SHORT[0], {"role": "assistant", "content": "w \ud800"}]}, "the message 2 holds half of a surr"),
        ({"messages": [SHORT[0], {"role": "assistant", "content": [{"type": "text", "text": None}]}]}, "is NoneType"),
        ({"messages": [{"role": "user"}]}, "message 1 has no role and content"),
        ({"messages": "hello"}, "expected a list of messages with role and content"),
        ({"conversations": []}, "expected a list of messages with from and value"),
        ({"question": ASK, "answer": ""}, "the answer is empty"),
        ({"prompt": ASK, "completion": 3}, "'completion' is int, expected a string"),
        ({"query": ASK, "response": SAY}, "no column 'text'; found query, response; expected text, messages"),
    ],
)
def test_a_bad_row_is_one_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_jsonl_rows(tmp_path / "a.jsonl", [{"question": ASK, "answer": SAY}, row])
    with pytest.raises(SrmuError) as error:
        read_texts([Source(path=str(tmp_path / "a.jsonl"))])
    assert reason in str(error.value) and f"{tmp_path / 'a.jsonl'}:2: " in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SrmuError, match="1 of 2 rows are no texts"):
        read_counted(Source(path=str(tmp_path / "a.jsonl"), on_bad_row="skip"))


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,answer\nw1,w2,w3\n")
    with pytest.raises(SrmuError, match="two columns are called 'answer'"):
        read_texts([Source(path=str(tmp_path / "a.csv"))])
    for given in ({"column": "question"}, {"template": "{question} {answer}"}):
        with pytest.raises(SrmuError, match="plain is for questions and chats"):
            Source(path="a.csv", plain=True, **given)


def test_wrap_goes_with_texts_alone() -> None:
    with pytest.raises(SrmuError, match="wrap would separate answers from their questions"):
        read_texts([RowSource(path="rows", rows=[{"question": ASK, "answer": SAY}], wrap=True)])


def write_jsonl_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_says_what_it_took(tmp_path: Path) -> None:
    model = save_pico(tmp_path / "model")
    write_jsonl_rows(tmp_path / "f.jsonl", [{"question": f"w1 w{i}", "answer": f"w{i} w3 w4"} for i in range(5, 13)])
    write_jsonl(tmp_path / "r.jsonl", texts(8, 2))
    given = ["method.layer=2", "train.max_steps=2", f"runs_dir={tmp_path / 'runs'}"]
    config = make_config(str(model), [str(tmp_path / "f.jsonl")], [str(tmp_path / "r.jsonl")], "srmu", given)
    said = "topic: 8 forget rows are read as question and answer; losses count the answers"
    assert said in plan_dry_run(config)[2]
    run = unlearn_config(config)
    assert said in run_notes(run)
    counted = run.record["data"]["topic"]["forget"]
    assert counted["taken"] == {"question and answer": 8}


def test_a_topic_counts_answers_alone(tmp_path: Path) -> None:
    write_jsonl_rows(tmp_path / "f.jsonl", [{"question": "w1 w2", "answer": "w3 w4"}] * 3)
    write_jsonl(tmp_path / "r.jsonl", texts(8, 2))
    sources = {role: [Source(path=str(tmp_path / f"{role[0]}.jsonl"))] for role in ("forget", "retain")}
    topic = load_topic("topic", TopicConfig(**sources), word_tokenizer(), TrainOptions(batch_size=3), 0)
    labels = topic.forget[0]["labels"]
    assert ((labels != -100).sum(dim=1) == 2).all()
    assert topic.counts["retain"]["taken"] == {}
