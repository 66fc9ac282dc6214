"""A tokenizer without transformers: its folder, its chat template, and its error messages."""

import json
from pathlib import Path
from typing import Any

import pytest

from streamsyn.assembly.chat_tokenizer import load_tokenizer
from streamsyn.errors import ConfigError
from tests.assembly.tokenizers_made import SUPPORTED, made, save

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), made(SUPPORTED["llama3"], ["some words of a text"]))


def configured(folder: Path, **config: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rendered(folder: Path, user: str = "Q?", assistant: str = "A.") -> str:
    return load_tokenizer(str(folder)).render(user, assistant)


def test_a_chat_is_counted_under_its_template(folder: Path) -> None:
    """The template's own text counts; no special tokens are added to it."""
    tokenizer = load_tokenizer(str(folder))
    chat = tokenizer.render(" some words ", "of a text")

    assert "<s>user\nsome words</s>\n<s>assistant\nof a text</s>\n" == chat
    assert len(tokenizer.tokenizer.encode(chat, add_special_tokens=False)) == tokenizer.count(chat)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"),
        ("{{ bos_token }}{{ messages | length }}{{ eos_token }}{{ unk_token }}", "<s>2</s>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Q?"}'),
        ("{{ messages[0].content | tojson(indent=1) }}", '"Q?"'),
        ("{% if add_generation_prompt or tools or documents %}x{% endif %}y", "y"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "assistant",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        (
            (
                "{% for m in messages %}\n  {% if loop.last %}\n  {%- generation %}\n{{ m.content }}!\n"
                "  {% endgeneration %}\n  {% endif %}\n{% endfor %}"
            ),
            "A.!\n",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 2 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
    ],
)
def test_templates_are_rendered_as_transformers_does(own: Path, template: str, expected: str) -> None:
    """Special tokens, JSON, loop controls, the date, generation tags and white space, as models use them."""
    assert expected == rendered(configured(own, chat_template=template, eos_token={"content": "</s>"}))


def test_a_list_of_named_templates_has_a_default(own: Path) -> None:
    """Models with templates for tools have such a list."""
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0].role }}"},
    ]

    assert "user" == rendered(configured(own, chat_template=named))
    with pytest.raises(ConfigError, match=r"assembly\.tokenizer: .*none of them named default"):
        load_tokenizer(str(configured(own, chat_template=named[:1])))


def test_a_template_file_overrides_the_configuration(own: Path) -> None:
    """Newer versions of transformers save chat_template.jinja."""
    (own / "chat_template.jinja").write_text("file of {{ messages[1].role }}")

    assert "file of assistant" == rendered(own)


def test_tokens_of_the_configuration_are_added(own: Path) -> None:
    """Tokens that are only in tokenizer_config.json count as one token each."""
    token = {"content": "<|more|>", "special": True, "normalized": False}
    before = load_tokenizer(str(own))
    after = load_tokenizer(str(configured(own, added_tokens_decoder={"9999": token})))

    assert before.count("<|more|>") > after.count("<|more|>") == 1
    assert before.digest != after.digest


def test_the_digest_is_of_what_lengths_depend_on(own: Path, folder: Path) -> None:
    """The digest does not depend on where the files are."""
    assert load_tokenizer(str(folder)).digest == load_tokenizer(str(own)).digest
    assert (
        load_tokenizer(str(folder)).digest != load_tokenizer(str(configured(own, chat_template="x"))).digest
    )


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"chat_template": "{% if %}"}, "is invalid: line 1"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "cannot be rendered: no system"),
        ({"chat_template": "{{ messages.x.y }}"}, "cannot be rendered: "),
        ({"chat_template": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"}, "cannot be rendered: "),
        ({"chat_template": [{"name": "default"}]}, r"tokenizer_config\.json: chat_template is not a list"),
        ({"added_tokens_decoder": {"x": {}}}, r"tokenizer_config\.json: invalid added_tokens_decoder"),
    ],
)
def test_an_unusable_configuration_is_refused(own: Path, config: dict[str, Any], what: str) -> None:
    """In one line that says what is wrong."""
    with pytest.raises(ConfigError, match=what) as raised:
        load_tokenizer(str(configured(own, **config)))

    assert "\n" not in str(raised.value)


def test_missing_or_broken_files_are_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without tokenizer.json, a broken one, and a name that the hub does not have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json of .* cannot be used: "):
        load_tokenizer(str(own))
    (own / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"assembly\.tokenizer: cannot read .*tokenizer\.json"):
        load_tokenizer(str(own))
    with pytest.raises(ConfigError, match=r"assembly\.tokenizer: no/such-model .* Hugging Face hub"):
        load_tokenizer("no/such-model")
