"""Eight threads on one generator give what one gives, and leave torch as it was."""

from concurrent.futures import ThreadPoolExecutor

import torch
from tiny import CONDITION_DIM, generator, llama, llama_lora
from torch import nn

from peft_icm import AdapterLayout


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
