import json
import socket

import pytest
import torch

from benchmarks.paper import dry_run as module
from benchmarks.paper.dry_run import FLORENCE, LLAMA, MEMORY, PAPER_VOCABULARY, DryRunSettings, dry_run, dry_run_table, meta_lora
from peft_icm import AdapterLayout


@pytest.fixture(scope="module")
def result():
    """The full-size run, with the network shut."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run must not touch the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return dry_run()


def part(result, kind, **wanted):
    found = [entry for entry in result[kind] if all(entry[name] == value for name, value in wanted.items())]
    assert len(found) == 1, f"{len(found)} entries of {wanted}"
    return found[0]


class TestLayouts:
    def test_p_of_both_vocabularies(self, result):
        assert result["vocabulary_check"] == {"51289": 241_241, "51328": 241_280}

    @pytest.mark.parametrize("rank", [1, 2, 4, 8])
    def test_p_of_florence(self, result, rank):
        assert part(result, "loras", base=FLORENCE, rank=rank)["P"] == 241_280 * rank

    def test_p_of_the_paper(self):
        assert AdapterLayout.from_peft_model(meta_lora(FLORENCE, 8, PAPER_VOCABULARY)).numel == 1_929_928  # Table 4

    def test_llama(self, result):
        found = part(result, "loras", base=LLAMA)
        assert (found["rank"], found["P"], found["tensors"], found["dtype"]) == (2, 851_968, 128, "float32")
        assert found["base_parameters"] == 8_030_261_248
        assert found["logits"] == [8, 1024, 128_256]

    def test_nothing_is_allocated(self):
        model = meta_lora(LLAMA, 2)
        assert all(tensor.is_meta for tensor in model.parameters())
        assert {tensor.dtype for tensor in model.parameters() if not tensor.requires_grad} == {torch.bfloat16}
        assert sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad) == 851_968

    def test_unknown_base(self):
        with pytest.raises(ValueError, match=r"base='gpt2' is unknown: choose one of llama-3-8b, florence-2-base"):
            meta_lora("gpt2", 2)


class TestLoras:
    def test_steps(self, result):
        tasks = part(result, "loras", base=FLORENCE, rank=2)["tasks"]
        assert tasks["dog"]["steps"] == 150 * 549  # 4385 images in batches of 8
        assert list(tasks) == ["dog", "bicycle", "cat", "sofa", "motorbike"]
        assert {task["steps"] for task in part(result, "loras", base=LLAMA)["tasks"].values()} == {150 * 32}

    def test_flops_agree_with_the_formula(self, result):
        for task in part(result, "loras", base=LLAMA)["tasks"].values():
            assert task["flops"] == pytest.approx(task["flops_4n"], rel=0.05)

    def test_collections(self, result):
        for entry in result["loras"]:
            assert entry["collection_shape"] == [5, 50, entry["P"]]
            assert entry["collection_bytes"] == 5 * 50 * entry["P"] * 4

    def test_memory_adds_up(self, result):
        for entry in result["loras"] + result["generators"]:
            assert entry["peak_bytes"] == sum(entry["memory_bytes"].values()) > 0

    def test_attention_matrices_do_not_count(self):
        # Twice the tokens in one block are twice the activations of fused attention, four times the matrices of the plain form.
        model = meta_lora(LLAMA, 2)
        short, long = (module._lora_forward(LLAMA, model, DryRunSettings(lora_batch_size=1, block_size=size))[1] for size in (1536, 3072))
        assert long.saved == pytest.approx(2 * short.saved, rel=0.02)


class TestGenerators:
    def test_shapes(self, result):
        for entry in result["generators"]:
            lora = part(result, "loras", base=entry["base"], rank=entry["rank"])
            assert entry["input"] == entry["output"] == [40, lora["P"]]
            assert entry["steps"] == 2000 * 5  # 200 of the 250 snapshots, in batches of 40
            assert entry["bytes"] == 4 * entry["parameters"]

    def test_both_architectures_at_each_rank_and_table_5(self, result):
        made = {(entry["base"], entry["rank"], entry["num_conv_layers"]) for entry in result["generators"]}
        layers = (None, 10, 11, 12, 13, 14, 20)  # None: the principal architecture
        assert made == {(FLORENCE, rank, count) for rank in (1, 2, 4, 8) for count in layers} | {(LLAMA, 2, None), (LLAMA, 2, 12)}

    def test_activations_are_counted_right(self):
        with torch.device("meta"):
            network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 2))
        output, work = module._measure(network, lambda: network(torch.zeros(3, 4)))
        assert output.shape == (3, 2)
        assert work.flops == 2 * 3 * (4 * 8 + 8 * 2)
        assert work.saved == 4 * 3 * (4 + 8)  # the input, and the sigmoid's output, which two layers share
        assert work.largest == 4 * 3 * 8


class TestTotals:
    def test_tables(self, result):
        tables = result["tables"]
        assert list(tables) == ["1", "2", "4", "5", "6"]
        assert tables["6"]["added_hours"] == 0  # all of it is Table 1's
        assert tables["5"]["generators"] == 6 * 4
        for table in tables.values():
            assert 0 <= table["added_hours"] <= table["hours"] == pytest.approx(table["lora_hours"] + table["generator_hours"])

    def test_totals(self, result):
        totals = result["totals"]
        assert totals["collection_bytes"] == 250 * 4 * (851_968 + 241_280 * 15)
        assert totals["hours"] < sum(table["hours"] for table in result["tables"].values())
        assert totals["fits"] == (totals["peak_bytes"] <= MEMORY)
        assert 16.0e9 < result["downloads"][0]["bytes"] < 16.2e9

    def test_json_and_table(self, result):
        assert json.loads(json.dumps(result)) == result
        text = dry_run_table(result)
        assert "851,968" in text and "241,280" in text and "meta-llama/Meta-Llama-3-8B" in text
        assert max(map(len, text.splitlines())) <= 140


class TestSettings:
    def test_more_snapshots_than_epochs(self):
        with pytest.raises(
            ValueError, match=r"snapshots=60 must be between 1 and epochs=50: keep fewer snapshots or train for more epochs"
        ):
            DryRunSettings(epochs=50, snapshots=60)

    @pytest.mark.parametrize("wrong", [{"seeds": 0}, {"ranks": ()}, {"ranks": (1, 0)}, {"conv_layers": (-1,)}])
    def test_out_of_range(self, wrong):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* must be at least 1: give a positive number"):
            DryRunSettings(**wrong)
