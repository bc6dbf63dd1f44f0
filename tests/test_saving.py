"""Saved adapters and their cards: what a person wrote stays, and what a card says of the weights is true."""

import dataclasses

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CONDITION_DIM, filled, florence, florence_layout, generator, llama, llama_layout
from transformers import LlamaForCausalLM

from peft_icm import push_adapter, save_adapter
from peft_icm.adapters import attach
from peft_icm.adapters.load_into import load_into
from peft_icm.hub.cards import CHANGED, GENERATED

REPO = "me/sofas"
VECTOR = torch.linspace(-1, 1, CONDITION_DIM)


@pytest.fixture
def icm(base):
    return generator(dataclasses.replace(llama_layout(), base_model_name_or_path=str(base)))


def generated(icm, seed=5, **options):
    return icm.generate_adapter(task_vector=VECTOR, generator=torch.Generator().manual_seed(seed), **options)


def train(model):
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    tokens = torch.arange(5, 25)[None]
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model


def card_of(folder):
    text = (folder / "README.md").read_text()
    assert (GENERATED in text) + (CHANGED in text) <= 1
    return text


def words(text):
    """Which of the two sentences a card has, and its tags."""
    said = "generated" if GENERATED in text else "changed" if CHANGED in text else "nothing"
    return said, "generated" in ModelCard(text).data.tags


class TestWhereTheWeightsComeFrom:
    def test_generated(self, icm, tmp_path):
        assert words(card_of(save_adapter(generated(icm), tmp_path / "a"))) == ("generated", True)

    def test_generated_to_be_trained_on(self, icm, tmp_path):
        model = generated(icm, is_trainable=True)
        assert words(card_of(save_adapter(model, tmp_path / "a"))) == ("generated", True)
        text = card_of(save_adapter(train(model), tmp_path / "a"))
        assert words(text) == ("changed", False) and "| seed | 5 |" in text
        generated(icm, base_model=model)
        assert words(card_of(save_adapter(model, tmp_path / "a"))) == ("generated", True)

    def test_of_a_name_of_its_own(self, icm, tmp_path):
        model = generated(icm, adapter_name="cats")
        generated(icm, seed=6, base_model=model, adapter_name="dogs", is_trainable=True)
        train(model)
        assert words(card_of(save_adapter(model, tmp_path / "cats", "cats"))) == ("generated", True)
        assert words(card_of(save_adapter(model, tmp_path / "dogs", "dogs"))) == ("changed", False)

    def test_cast_and_merged_it_is_what_it_was(self, icm, tmp_path):
        model = generated(icm)
        model.merge_adapter()
        assert words(card_of(save_adapter(model, tmp_path / "a"))) == ("generated", True)
        model.unmerge_adapter()
        assert words(card_of(save_adapter(model.to(torch.bfloat16), tmp_path / "a"))) == ("generated", True)

    @pytest.mark.parametrize("when", ["attached without a word", "another adapter of that name"])
    def test_of_what_nobody_said_that_it_was_generated_nothing_is_said(self, icm, tmp_path, when):
        model, layout = generated(icm), llama_layout()
        if when == "attached without a word":
            attach(model, layout, filled(layout))
        else:
            generated(icm, base_model=model, adapter_name="other")
            model.delete_adapter("default")
            model.add_adapter("default", layout.lora_config())
        assert words(card_of(save_adapter(model, tmp_path / "a"))) == ("nothing", False)

    def test_trained_on_by_peft_alone(self, icm, base, tmp_path, hub, token):
        folder = save_adapter(generated(icm), tmp_path / "a")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, is_trainable=True)
        train(model).save_pretrained(folder)  # peft keeps the card that is there, and adds its version
        with pytest.warns(UserWarning, match="written for other weights"):
            push_adapter(folder, REPO, token=token)
        text = hub.repos["models", REPO].files()["README.md"].decode()
        assert CHANGED in text and GENERATED not in text and "- PEFT" in text

    def test_other_weights_in_its_folder(self, icm, tmp_path, hub, token):
        folder = save_adapter(generated(icm), tmp_path / "a")
        file = folder / "adapter_model.safetensors"
        push_adapter(folder, REPO, token=token)
        assert words(hub.repos["models", REPO].files()["README.md"].decode()) == ("generated", True)
        save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        push_adapter(folder, REPO, token=token)
        assert words(hub.repos["models", REPO].files()["README.md"].decode()) == ("changed", False)

    def test_pushed_from_the_model(self, icm, hub, token):
        push_adapter(train(generated(icm, is_trainable=True)), REPO, token=token)
        assert words(hub.repos["models", REPO].files()["README.md"].decode()) == ("changed", False)


@pytest.mark.parametrize("format", ["peft", "gguf"])
class TestWhatIsNotSaved:
    @pytest.mark.parametrize("make", [llama, florence])
    @pytest.mark.parametrize("filled_in", [False, True], ids=["bare", "load_into"])
    def test_what_is_no_peft_model(self, make, filled_in, format, tmp_path):
        model, layout = make(), llama_layout() if make is llama else florence_layout()
        if filled_in:
            load_into(model, layout, filled(layout))
        with pytest.raises(ValueError, match=f"^The model is a {type(model).__name__}, must be a PeftModel: .* generate_adapter or attach"):
            save_adapter(model, tmp_path / "a", format=format)
        with pytest.raises(ValueError, match="must be a PeftModel"):
            push_adapter(model, REPO)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, icm, bad, format, tmp_path):
        pytest.importorskip("gguf")
        folder = save_adapter(generated(icm), tmp_path / "a", format=format)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        model = generated(icm, seed=6)
        with torch.no_grad():
            model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").weight[0, 0] = bad
        with pytest.raises(ValueError, match="The adapter holds 1 NaN or infinite values"):
            save_adapter(model, folder, format=format)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_whose_values_are_not_finite_is_not_pushed(icm, tmp_path, hub, token):
    folder = save_adapter(generated(icm), tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor / 0 for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values"):
        push_adapter(folder, REPO, token=token)
    assert ("models", REPO) not in hub.repos


CARDS = {
    "their own": b"# Sofas\n\nMeasured by hand.\n",
    "with front matter": b"---\nlicense: mit\n---\n# Sofas\n",
    "of Windows": b"# Sofas\r\n\r\nMeasured by hand.\r\n",
    "with front matter that is no YAML": b"---\nlicense: [\n---\n# Sofas\n",
    "not of UTF-8": b"# Canap\xe9s\n",
    "empty": b"",
}


class TestCardsThatPeopleEdit:
    @pytest.mark.parametrize("card", CARDS)
    def test_saving_keeps_them(self, icm, tmp_path, card):
        folder = save_adapter(generated(icm), tmp_path / "a")
        (folder / "README.md").write_bytes(CARDS[card])
        before = load_file(folder / "adapter_model.safetensors")
        save_adapter(generated(icm, seed=6), folder)
        assert (folder / "README.md").read_bytes() == CARDS[card]
        after = load_file(folder / "adapter_model.safetensors")
        assert not any(torch.equal(before[key], after[key]) for key in before)

    def test_so_does_saving_into_a_folder_that_peft_wrote(self, icm, tmp_path):
        model = get_peft_model(llama(), llama_layout().lora_config())
        model.save_pretrained(tmp_path / "a")
        form = card_of(tmp_path / "a")
        assert "More Information Needed" in form
        save_adapter(generated(icm), tmp_path / "a")
        assert GENERATED in card_of(tmp_path / "a")  # peft's empty form is nobody's
        (tmp_path / "a" / "README.md").write_text(form.replace("[More Information Needed]", "Measured by hand.", 1))
        save_adapter(generated(icm), tmp_path / "a")
        assert "Measured by hand." in card_of(tmp_path / "a") and GENERATED not in card_of(tmp_path / "a")

    def test_what_was_written_here_and_not_edited_is_replaced(self, icm, tmp_path):
        save_adapter(generated(icm), tmp_path / "a")
        save_adapter(generated(icm, seed=6), tmp_path / "a")
        assert "| seed | 6 |" in card_of(tmp_path / "a")

    def test_an_edited_one_does_not_vouch_for_weights_that_were_trained_on(self, icm, tmp_path, recwarn):
        model = generated(icm, is_trainable=True)
        folder = save_adapter(model, tmp_path / "a")
        (folder / "README.md").write_text(card_of(folder) + "\nMeasured by hand.\n")
        save_adapter(model, folder)
        assert GENERATED in card_of(folder) and not [warning for warning in recwarn if "by hand" in str(warning.message)]
        train(model)
        with pytest.warns(UserWarning, match=r"a/README\.md was edited by hand, and is kept, but it was written for other weights"):
            save_adapter(model, folder)
        assert CHANGED in card_of(folder) and "Measured by hand." in card_of(folder)

    def test_pushed_they_are_as_they_were(self, icm, tmp_path, hub, token):
        folder = save_adapter(generated(icm), tmp_path / "a")
        (folder / "README.md").write_bytes(CARDS["their own"])
        save_adapter(generated(icm, seed=6), folder)
        push_adapter(folder, REPO, token=token)
        assert hub.repos["models", REPO].files()["README.md"] == CARDS["their own"]
