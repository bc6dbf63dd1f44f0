"""Eight threads on one generator give what one gives, and leave torch as it was."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model_state_dict
from tiny import CONDITION_DIM, filled, generator, llama, llama_layout, llama_lora
from torch import nn

from peft_icm import AdapterLayout
from peft_icm.adapters import attach
from peft_icm.adapters.attach import unchanged_on_failure


def test_eight_threads_give_what_one_gives(tmp_path):
    llama().save_pretrained(tmp_path)
    layout = AdapterLayout.from_peft_model(llama_lora())
    icm = generator(AdapterLayout.from_dict({**layout.to_dict(), "base_model_name_or_path": str(tmp_path)}))
    register = nn.Module.register_parameter
    tokens, vectors = torch.arange(10, 30)[None], torch.randn(8, CONDITION_DIM, generator=torch.Generator().manual_seed(0))

    def run(index):
        model = icm.generate_adapter(task_vector=vectors[index], generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return model(tokens).logits

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, [*range(8)] * 3))
    assert nn.Module.register_parameter is register and not nn.Linear(2, 2).weight.is_meta
    for index, logits in enumerate(found):
        torch.testing.assert_close(logits, run(index % 8))


def test_a_failure_in_one_thread_takes_nothing_from_the_others():
    layout = llama_layout()
    model = attach(llama(), layout, filled(layout), adapter_name="first")
    values = [filled(layout, seed) for seed in range(8)]
    names = [f"{'bad' if index % 2 else 'good'}{index}" for index in range(8)]

    def run(index):
        with unchanged_on_failure(model):
            for part in "xy":
                attach(model, layout, values[index], adapter_name=f"{names[index]}{part}")
            if names[index].startswith("bad"):
                raise ValueError("no more memory")

    with ThreadPoolExecutor(8) as pool:
        for name, future in zip(names, [pool.submit(run, index) for index in range(8)], strict=True):
            if name.startswith("bad"):
                with pytest.raises(ValueError, match="no more memory"):
                    future.result()
            else:
                future.result()
    good = [f"good{index}{part}" for index in range(0, 8, 2) for part in "xy"]
    assert sorted(model.peft_config) == sorted(["first", *good])
    for name in good:
        found = get_peft_model_state_dict(model, adapter_name=name)
        assert all(torch.equal(found[key], value) for key, value in values[int(name[4])].items())
