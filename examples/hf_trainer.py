"""The Hugging Face Trainer on a sequence that is cut over ranks: ten steps.

    torchrun --nproc-per-node=4 examples/hf_trainer.py        # 4 ranks, one sequence
    torchrun --nproc-per-node=4 examples/hf_trainer.py --dp 2 # 2 x 2: data, sequence
    python examples/hf_trainer.py                             # the same on one rank

Two things differ from a Trainer as it comes, both in ``RingTrainer``: batches are drawn
by *data-parallel* rank, so that all ranks of one sequence see the same batch, and the
model is wrapped in DDP over the data-parallel ranks only, or not at all. The compiled
graph takes its part of the batch and gives gradients that are whole.

Needs ``pip install 'ringcompile[hf]'``.
"""

import argparse
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class RingTrainer(Trainer):
    """A Trainer for a model that is compiled with ``backend="ring"``.

    Args:
        mesh: dims ``dp`` and ``cp``; None on one rank.
        arguments: as for ``Trainer``.
    """

    def __init__(self, *, mesh: DeviceMesh | None, **arguments: Any) -> None:  # noqa: ANN401
        self.mesh = mesh
        super().__init__(**arguments)

    def get_tp_size(self) -> int:
        """Ranks that see the same batch: it counts tokens and steps by this."""
        return 1 if self.mesh is None else self.mesh["cp"].size()

    def create_accelerator_and_postprocess(self) -> None:
        """Keep Accelerate from wrapping the model in DDP over all ranks."""
        super().create_accelerator_and_postprocess()
        prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)

        def prepare_model(model: Any, **options: Any) -> Any:  # noqa: ANN401
            model = prepare(model, **options | {"evaluation_mode": True})
            if self.mesh is None or self.mesh["dp"].size() == 1:
                return model
            group = self.mesh["dp"].get_group()
            return DistributedDataParallel(model, process_group=group)

        self.accelerator.prepare_model = prepare_model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Give each data-parallel rank its batches; Accelerate would cut by rank."""
        dp = None if self.mesh is None else self.mesh["dp"]
        data: Any = self.train_dataset
        sampler: DistributedSampler[Any] = DistributedSampler(
            data,
            num_replicas=1 if dp is None else dp.size(),
            rank=0 if dp is None else dp.get_local_rank(),
            seed=self.args.seed,
        )
        return DataLoader(
            data,
            self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
        )


class Tokens(Dataset[dict[str, Tensor]]):
    """Random sequences, the same on every rank."""

    def __init__(self, num_rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(256, (num_rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def build_model() -> LlamaForCausalLM:
    """The same random weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(
    mesh: DeviceMesh | None, *, steps: int, length: int, batch: int, compiles: bool
) -> list[float]:
    """Train for some steps.

    Args:
        mesh: dims ``dp`` and ``cp``; None on one rank.
        steps: optimizer steps.
        length: tokens of a sequence.
        batch: sequences of a step, over all data-parallel ranks.
        compiles: whether the model is compiled.

    Returns:
        The loss of each step.
    """
    model = build_model()
    if compiles:  # in place, so that the Trainer sees the model that it knows
        cp = None if mesh is None else mesh["cp"]
        model.compile(backend="ring", options={"mesh": cp})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch
            if mesh is None
            else batch // mesh["dp"].size(),
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        data = Tokens(steps * batch, length)
        trainer = RingTrainer(
            mesh=mesh, model=model, args=arguments, train_dataset=data
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train, and print the curve on the first rank."""
    parser = argparse.ArgumentParser(description="ten steps of the HF Trainer")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    chosen = parser.parse_args()
    mesh = None
    if dist.is_torchelastic_launched():  # by torchrun
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        shape = (chosen.dp, dist.get_world_size() // chosen.dp)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "cp"))
    losses = train(
        mesh,
        steps=chosen.steps,
        length=chosen.length,
        batch=chosen.batch,
        compiles=not chosen.eager,
    )
    if mesh is None or dist.get_rank() == 0:
        print("loss", *(f"{loss:.5f}" for loss in losses))
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
