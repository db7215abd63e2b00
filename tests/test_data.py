"""From files to batches: what a row becomes token by token, which files are refused and how, the
order of rows."""
import json

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

import data
from cli import InputError

QUESTION, ANSWER = "Where was Ada born?", "Ada was born in Oru."


def model_folder(path, library, config, settings):
    """A folder with a tokenizer and no weights: all that data.Tokenizer reads."""
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    for name, content in (("config", config), ("tokenizer_config", settings)):
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def put_in_front(begin, library):
    """`library`, adding the token `begin` to every text."""
    special = [(begin, library.token_to_id(begin))]
    library.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=special)
    return library


def words(vocabulary):
    """A tokenizer that splits at white space, one id a word."""
    ids = {word: i for i, word in enumerate(vocabulary.split())}
    library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def row(**keys):
    return data.Example(
        **({"question": QUESTION, "answer": ANSWER, "where": "rows.jsonl:1"} | keys))


def one(example, tokenizer, max_length=128):
    (sequence,), cut = data.encode([example], tokenizer, max_length)
    assert cut == (not sequence.ended)
    return sequence


# ---- tokens of a question and its answer


def test_targets_are_the_next_tokens_and_the_mask_is_the_answer_with_its_end_token(tmp_path):
    #                0     1       2         3     4    5   6       7  8    9  10
    library = words("<end> <begin> Question: Where Ada? Who Answer: In Oru. Bo <unk>")
    folder = model_folder(tmp_path, put_in_front("<begin>", library), {}, {"eos_token": "<end>"})
    rows = [data.Example("Where Ada?", "In Oru.", spans=[[3, 6]]), data.Example("Who", "Bo")]
    sequences, cut = data.encode(rows, data.Tokenizer(folder), 20)
    assert [(s.tokens, s.start, s.ended, s.row) for s in sequences] == [
        ([1, 2, 3, 4, 6, 7, 8, 0], 5, True, 0),
        ([1, 2, 5, 6, 9, 0], 4, True, 1)]
    assert cut == 0
    batch = data.collate(sequences)
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 6, 7, 8], [1, 2, 5, 6, 9, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 6, 7, 8, 0], [2, 5, 6, 9, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert [s.informative for s in sequences] == [[False, True, False], None]
    assert batch.lengths.tolist() == [7, 5]


@pytest.mark.parametrize("vocabulary, template, front", [
    # as SentencePiece does, "_" before every text: an answer apart would begin with it
    ("<end> <unk> _Question: Who Answer: In Oru. _", "plain", "_"),
    # "[/INST]In" is one unknown word: the prompt's tokens are no prefix of the whole
    ("<end> <unk> [INST] Who [/INST] In Oru.", "llama2", ""),
])
def test_prompt_and_answer_are_tokenised_together_where_the_prompt_is_a_prefix_else_apart(
        tmp_path, vocabulary, template, front):
    library = words(vocabulary)
    library.normalizer = tokenizers.normalizers.Prepend(front) if front else None
    tokenizer = data.Tokenizer(
        model_folder(tmp_path, library, {}, {"eos_token": "<end>"}), template)
    sequence = one(data.Example("Who", "In Oru.", spans=[[3, 7]]), tokenizer)
    assert (sequence.tokens, sequence.start) == ([2, 3, 4, 5, 6, 0], 3)
    assert sequence.informative == [False, True, False]


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
@example("Where?", "Żółć 🦊")
def test_answer_tokens_spell_the_answer_and_every_target_is_a_valid_id(letters, question, answer):
    sequence = one(row(question=question, answer=answer), letters, 10_000)
    assert letters.decode(sequence.tokens[sequence.start:-1]) == f" {answer}"
    assert sequence.tokens[-1] == letters.end_id
    batch = data.collate([sequence, one(row(), letters)])
    assert 0 <= batch.targets.min() and batch.targets.max() < letters.vocab_size
    assert batch.mask.sum(1).tolist() == [
        len(s.tokens) - s.start for s in (sequence, one(row(), letters))]


@given(st.data())
def test_a_token_is_informative_if_its_non_space_characters_overlap_a_span(letters, draw):
    answer = draw.draw(st.text("aé🦊 dorn", min_size=1, max_size=12).filter(str.strip))
    ends = st.integers(0, len(answer))
    spans = draw.draw(st.lists(
        st.tuples(ends, ends).filter(lambda s: s[0] < s[1]).map(list), max_size=3))
    sequence = one(row(answer=answer, spans=spans), letters)
    marked = {i for a, b in spans for i in range(a, b) if not answer[i].isspace()}
    # the character that each byte belongs to
    byte_of = [i for i, c in enumerate(answer) for _ in c.encode()]
    expected, done = [], -1  # −1: the leading space
    for token in sequence.tokens[sequence.start:-1]:
        # one character a byte in a byte-level vocabulary
        size = len(letters.backend.id_to_token(token))
        covered = {byte_of[i] for i in range(max(0, done), done + size)}
        expected.append(bool(covered & marked))
        done += size
    assert sequence.informative == expected + [False]


@given(st.integers(-3, 3))
def test_an_answer_cut_for_length_has_no_end_token_and_is_counted(letters, spare):
    whole = one(row(), letters)
    room = len(whole.tokens) + spare
    (sequence,), cut = data.encode([row(spans=[[0, 3]])], letters, room)
    assert sequence.tokens == whole.tokens[:room]
    assert (sequence.ended, cut) == ((True, 0) if spare >= 0 else (False, 1))
    assert len(sequence.informative) == len(sequence.tokens) - sequence.start


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_its_file_and_line(letters):
    start = one(row(), letters).start
    assert one(row(), letters, start + 1).start == start
    with pytest.raises(InputError, match=r"^rows\.jsonl:1: the prompt's \d+ tokens leave no room"):
        data.encode([row()], letters, start)


@given(st.text(min_size=1).filter(str.strip), st.integers(2, 9))
def test_every_token_of_a_text_after_the_first_is_a_target_exactly_once(letters, text, max_length):
    ids = letters.backend.encode(text).ids
    if len(ids) < 2:
        with pytest.raises(InputError, match="nothing to predict"):
            data.encode([data.Example(text=text)], letters, max_length)
        return
    sequences, cut = data.encode([data.Example(text=text)], letters, max_length)
    batch = data.collate(sequences)
    assert batch.targets[batch.mask].tolist() == ids[1:]
    assert batch.inputs.shape[1] < max_length and cut == 0


def test_a_row_without_spans_is_unlabelled_as_is_a_given_answer_and_a_row_with_an_empty_list_is_structural(  # noqa: E501
        letters):
    assert (one(row(), letters).informative is None
            and not any(one(row(spans=[]), letters).informative))
    (sequence,), _ = data.encode([row(spans=[[0, 3]])], letters, 128, answers=["Bo was born."])
    assert (letters.decode(sequence.tokens[sequence.start:]) == " Bo was born."
            and sequence.informative is None)


# ---- templates: what the chat templates of the models themselves give

LLAMA3 = """\
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" + "Today Date: " + date_string + "\\n\\n" }}
{{- messages[0]['content'] | trim + "<|eot_id|>" }}
{%- for message in messages[1:] %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'\
+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}\
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA2 = """\
{% for message in messages %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}\
{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

# template: (chat template less the branches not taken here; begin; end; other special tokens;
# rendered)
FAMILIES = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>",
               ["<|start_header_id|>", "<|end_header_id|>"],
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
               "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\n"
               "You are a helpful assistant.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n"
               "Where was Ada born?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n"
               "Ada was born in Oru.<|eot_id|>"),
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"],
               "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\nWhere was Ada born?<|im_end|>\n"
               "<|im_start|>assistant\nAda was born in Oru.<|im_end|>"),
    "llama2": (LLAMA2, "<s>", "</s>", [],
               "<s>[INST] Where was Ada born? [/INST]Ada was born in Oru.</s>"),
    "plain": (None, "<s>", "</s>", [],
              "<s>Question: Where was Ada born?\nAnswer: Ada was born in Oru.</s>"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny, tmp_path_factory):
    """(template name, folder of a model of that family)"""
    _, begin, end, special, _ = FAMILIES[request.param]
    library = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    library.add_special_tokens([t for t in (begin, end, *special) if t])
    if begin:
        put_in_front(begin, library)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": begin}
    return (request.param,
            model_folder(tmp_path_factory.mktemp(request.param), library, {}, settings))


def test_templates_render_the_stored_text_with_one_begin_token(family):
    name, folder = family
    tokenizer = data.Tokenizer(folder, name)
    sequence = one(row(), tokenizer, 2048)
    assert tokenizer.backend.decode(
        sequence.tokens, skip_special_tokens=False) == FAMILIES[name][-1]
    assert tokenizer.decode(sequence.tokens[sequence.start:]).strip() == ANSWER


@pytest.mark.parametrize("family", ["llama2", "llama3", "chatml"], indirect=True)
@pytest.mark.parametrize("question", [QUESTION, "Zażółć 🦊?\nYes", "<b>&amp; {x}"])
def test_token_ids_are_those_of_the_chat_template_in_transformers(transformers, family, question):
    name, folder = family
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    system = [] if name == "llama2" else [
        {"role": "system", "content": "You are a helpful assistant."}]
    asked = [*system, {"role": "user", "content": question}]
    known = {"chat_template": FAMILIES[name][0], "date_string": "10 Apr 2025", "tokenize": False}
    prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, **known)
    tokenizer = data.Tokenizer(folder, name)
    sequence = one(row(question=question), tokenizer, 2048)
    assert sequence.tokens[:sequence.start] == theirs(prompt, add_special_tokens=False)["input_ids"]
    # TOFU's llama2 template, which is ours, has no space in front of the answer
    if name != "llama2":
        whole = theirs.apply_chat_template(
            [*asked, {"role": "assistant", "content": ANSWER}], **known)
        expected = theirs(whole, add_special_tokens=False)["input_ids"]
        # chatml goes on with a line break
        last = len(expected) - expected[::-1].index(tokenizer.end_id)
        assert sequence.tokens == expected[:last]


# ---- end tokens and tokenizers that do not fit


@pytest.mark.parametrize("settings, config, expected", [
    ({"eos_token": "<unk>"}, {"eos_token_id": 1}, 2),
    ({"eos_token": {"content": "<unk>", "lstrip": False}}, {}, 2),
    ({}, {"eos_token_id": 1}, 1),
    ({"eos_token": None}, {"eos_token_id": [1, 2]}, 1),
    (None, {"eos_token_id": 1}, 1),
])
def test_the_end_token_is_the_tokenizers_else_the_first_of_the_configuration(
        tmp_path, settings, config, expected):
    folder = model_folder(tmp_path, words("a b <unk>"), config, settings)
    assert [data.Tokenizer(folder, template).end_id
            for template in ("plain", "llama2")] == [expected] * 2


@pytest.mark.parametrize("files, template, message", [
    ({"config.json": "{}"}, "plain", "no end token"),
    ({"config.json": '{"eos_token_id": []}'}, "plain", "no end token"),
    ({"config.json": '{"eos_token_id": "1"}'}, "plain", "no end token"),
    ({"config.json": '{"eos_token_id": 99, "vocab_size": 3}'}, "plain", "99"),
    ({"config.json": '{"eos_token_id": -1, "vocab_size": 3}'}, "plain", "-1"),
    ({"config.json": '{"eos_token_id": 1, "vocab_size": 2}'}, "plain",
     "3 tokens, but the model's embedding has 2"),
    ({"tokenizer_config.json": '{"eos_token": "z"}'}, "plain", "no end token 'z'"),
    ({}, "llama3", "no end token '<|eot_id|>': choose another --template"),
    ({}, "chatml", "no end token '<|im_end|>'"),
    ({"tokenizer.json": None}, "plain", "tokenizer.json: cannot be read (No such file"),
    *(({f"{name}.json": "{]"}, "plain", f"/{name}.json: ")
      for name in ("tokenizer", "tokenizer_config", "config")),
])
def test_a_tokenizer_that_is_broken_or_does_not_fit_the_model_is_refused(
        tmp_path, files, template, message):
    model_folder(tmp_path, words("a b <unk>"), {"eos_token_id": 1}, {})
    for name, content in files.items():
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refusal:
        data.Tokenizer(tmp_path, template)
    assert (message in str(refusal.value)
            and str(tmp_path) in str(refusal.value)
            and "\n" not in str(refusal.value))


# ---- files


GOOD = {"question": "Who?", "answer": "Bo.",
        "paraphrased_answer": "It is Bo.", "perturbed_answer": ["Cy.", "Di."],
        "spans": [[0, 2]], "anything": "else"}


def test_a_json_list_reads_as_json_lines(tmp_path):
    rows = [GOOD, {"text": "Once upon a time"}, {"question": "Żółć?", "answer": "🦊\u2028\x85"}]
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "list.json"
    text = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    lines.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    whole.write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    read = [[vars(e) | {"where": ""} for e in data.read_jsonl(path)] for path in (lines, whole)]
    assert read[0] == read[1]
    assert read[0][0] == (
        {k: GOOD[k] for k in data.Example.__annotations__ if k in GOOD}
        | {"text": None, "where": ""})
    assert [e.where for e in data.read_jsonl(lines)] == [f"{lines}:{n}" for n in (1, 3, 5)]


@pytest.mark.parametrize("bad, message", [
    (5, "must be a JSON object, not int"), (None, "must be a JSON object"),
    ({}, "`question` is missing"),
    ({"question": "Who?"}, "`answer` is missing"), ({"answer": "Bo."}, "`question` is missing"),
    ({"text": ""}, "`text` must be"), ({"text": ["a"]}, "`text` must be"),
    ({"text": "\ud800"}, "surrogate"),
    *((GOOD | wrong, message) for wrong, message in [
        ({"answer": 3}, "`answer` must be a string"),
        ({"answer": " \n"}, "must be a string that is not blank"),
        ({"question": None}, "`question` must be"), ({"question": ""}, "`question` must be"),
        ({"answer": "Bo \udfff"}, "surrogate"), ({"perturbed_answer": ["\ud800"]}, "surrogate"),
        *(({"paraphrased_answer": value}, "`paraphrased_answer`") for value in ("", ["x"])),
        *(({"perturbed_answer": value}, "`perturbed_answer`")
          for value in (["x", ""], {"a": "b"}, 0, {})),
        ({"spans": 3}, "`spans` must be a list"),
        *(({"spans": [span]}, "pair of integers")
          for span in (3, [0, 1, 2], [0, 1.0], [False, True])),
        *(({"spans": [span]}, "not inside the answer's 3")
          for span in ([0, 4], [2, 1], [1, 1], [-1, 2])),
    ]),
])
def test_a_wrong_row_is_refused_in_one_line_that_names_its_file_and_place(tmp_path, bad, message):
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(bad))
    whole.write_text(json.dumps([GOOD, bad]))
    for path, place in {lines: f"{lines}:3: ", whole: f"{whole}: row 2: "}.items():
        with pytest.raises(InputError) as refusal:
            data.read_jsonl(path)
        assert str(refusal.value).startswith(place) and message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content, message", [
    (b"", ": no rows"), (b" \n\n", ": no rows"), (b"[]", ": no rows"),
    (b'{"question": "\xff"}', ": not UTF-8 text (byte 14)"), (b"\x00\x01\x02", ":1: broken JSON"),
    (b'\n{"question": ', ":2: broken JSON"),
    (b'{"text": "a b"}\n{"text": "c d"', ":2: broken JSON"),
    (b'[{"text": "a b"},\n\n}]', ": broken JSON (Expecting value, line 3"),
    (b"question,answer", ":1: broken JSON"),
    (b"\n" + b'{"a":' * 100_000, ":2: broken JSON (nested too deep"),
    (b"[" * 100_000, ": broken JSON (nested"),
    (b'{"text": ' + b"1" * 5000 + b"}", ":1: broken JSON (nested too deep or a number too long"),
])
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    for path, said in ((tmp_path / "rows.jsonl", message),
                       (tmp_path / "absent", ": cannot be read (No such file"),
                       (tmp_path, ": cannot be read (Is a directory")):
        with pytest.raises(InputError) as refusal:
            data.read_jsonl(path)
        assert str(refusal.value).startswith(f"{path}{said}") and "\n" not in str(refusal.value)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (st.lists(inner, max_size=4)
                   | st.dictionaries(st.text(max_size=3), inner, max_size=4)))
NEARLY = st.fixed_dictionaries({}, optional={  # rows that are right but for some of their values
    "question": st.just("Who?") | ANY, "answer": st.just("Bo it is.") | ANY,
    "text": st.just("a b") | ANY,
    "paraphrased_answer": st.text() | ANY, "perturbed_answer": st.lists(st.text() | ANY) | ANY,
    "spans": st.lists(st.lists(st.integers(-2, 12), min_size=1, max_size=3)) | ANY})
ROWS = st.lists(ANY | NEARLY, min_size=1, max_size=3)


@given(st.binary(max_size=60) | st.text('{}[]":,\n\\u0aé ', max_size=60).map(str.encode)
       | ROWS.map(lambda rows: json.dumps(rows).encode())
       | ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
@settings(max_examples=200)
@example(b'{"question": "a", "answer": "b", "spans": ' + b"[" * 900 + b"]" * 900 + b"}")
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hypothesis.jsonl"
    path.write_bytes(content)
    try:
        examples = data.read_jsonl(path)
    except InputError as refusal:
        assert str(refusal).startswith(str(path)) and len(str(refusal).splitlines()) == 1
        return
    for e in examples:
        assert (e.text or e.answer).strip() and e.where.startswith(str(path))
        assert all(0 <= a < b <= len(e.answer) for a, b in e.spans or [])
        assert all(isinstance(s, str) and s.strip()
                   for s in [*e.perturbed_answer, e.paraphrased_answer or "none"])
    assert examples


# ---- order


def test_the_order_of_a_pass_depends_on_seed_stream_and_pass_and_on_nothing_else():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [data.order(50, *place) for place in places]
    torch.manual_seed(1)  # no global generator takes part
    assert [data.order(50, *place) for place in places] == first
    assert len(set(map(tuple, first))) == 4


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 30))
def test_every_row_is_drawn_before_one_repeats_however_the_drawing_is_cut(n, seed, first, count):
    whole = data.draw(n, seed, 1, 0, first + count)
    assert data.draw(n, seed, 1, first, count) == whole[first:]
    for start in range(0, len(whole) - n + 1, n):
        assert sorted(whole[start:start + n]) == list(range(n))
