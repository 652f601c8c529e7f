"""The peer: ELECTRA pretraining as one writes it with transformers' two models.

Shapes: B rows, T tokens, M masked positions of a row, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from model.batch import MicroBatch
from model.config import EncoderShape, ModelConfig
from pipeline.config import Config

_IGNORED = -100
PeerInputs = tuple[Tensor, Tensor, Tensor, Tensor]


class HfElectra(nn.Module):
    """Generator with its head on all positions, Gumbel sampling, discriminator; embeddings in common."""

    def __init__(self, config: Config, vocab_size: int, attention: str):
        """``attention`` is transformers' name of an implementation: ``eager`` or ``sdpa``."""
        super().__init__()
        model = config.model
        self.discriminator = ElectraForPreTraining(_hf_config(model, model.discriminator, vocab_size, attention))
        self.generator = ElectraForMaskedLM(_hf_config(model, model.generator, vocab_size, attention))
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.generator_lm_head.weight = self.discriminator.electra.embeddings.word_embeddings.weight
        self.generator_weight = config.objective.generator_loss_weight
        self.discriminator_weight = config.objective.discriminator_loss_weight

    def forward(
        self,
        token_ids_BT: Tensor,
        generator_ids_BT: Tensor,
        token_types_BT: Tensor,
        positions_BM: Tensor,
        gathers: bool,
    ) -> Tensor:
        """The weighted loss; with ``gathers`` the generator's head sees the masked positions alone."""
        original_BM = token_ids_BT.gather(1, positions_BM)
        predict = self._predict_masked if gathers else self._predict_all
        generator_loss, sampled_BM = predict(generator_ids_BT, token_types_BT, positions_BM, original_BM)
        corrupted_BT = token_ids_BT.scatter(1, positions_BM, sampled_BM)
        discriminated = self.discriminator(
            input_ids=corrupted_BT, token_type_ids=token_types_BT, labels=(corrupted_BT != token_ids_BT).long()
        )
        return self.generator_weight * generator_loss + self.discriminator_weight * discriminated.loss

    def _predict_all(
        self, ids_BT: Tensor, token_types_BT: Tensor, positions_BM: Tensor, original_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss as transformers makes it, and samples."""
        labels_BT = torch.full_like(ids_BT, _IGNORED).scatter(1, positions_BM, original_BM)
        generated = self.generator(input_ids=ids_BT, token_type_ids=token_types_BT, labels=labels_BT)
        index_BMV = positions_BM[..., None].expand(-1, -1, generated.logits.shape[-1])
        return generated.loss, self.sample(generated.logits.detach().gather(1, index_BMV))

    def _predict_masked(
        self, ids_BT: Tensor, token_types_BT: Tensor, positions_BM: Tensor, original_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_BTD = self.generator.electra(input_ids=ids_BT, token_type_ids=token_types_BT).last_hidden_state
        hidden_BMD = hidden_BTD.gather(1, positions_BM[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
        return self.masked_head(hidden_BMD, original_BM)

    def masked_head(self, hidden_BMD: Tensor, original_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and samples at masked positions."""
        logits_BMV = self.generator.generator_lm_head(self.generator.generator_predictions(hidden_BMD))
        loss = F.cross_entropy(logits_BMV.float().flatten(0, 1), original_BM.flatten())
        return loss, self.sample(logits_BMV.detach())

    def sample(self, logits_BMV: Tensor) -> Tensor:
        """Gumbel-max."""
        noise_BMV = torch.empty_like(logits_BMV, dtype=torch.float32).exponential_()
        return (logits_BMV.float() - noise_BMV.log()).argmax(-1)

    def compile_parts(self, **options: Any) -> None:
        """torch.compile for embeddings, layers, heads and sampling; the layers of a network share one compilation.

        A whole model takes minutes for each size of a micro-batch.
        """
        parts: list[nn.Module] = [self.discriminator.electra.embeddings, self.discriminator.discriminator_predictions]
        parts += [*self.generator.electra.encoder.layer, *self.discriminator.electra.encoder.layer]
        for part in [*parts, self.generator.generator_predictions]:
            part.compile(dynamic=False, **options)
        self.sample = torch.compile(self.sample, dynamic=False, **options)
        self.masked_head = torch.compile(self.masked_head, dynamic=False, **options)


class HfTrainer:
    """One optimizer step under automatic mixed precision in bf16, torch's fused AdamW."""

    def __init__(self, config: Config, vocab_size: int, attention: str, device: str, compiles: bool):
        with torch.device(device):
            self.model = HfElectra(config, vocab_size, attention).train()
        if compiles:
            self.model.compile_parts()
        self._device, self._clip, lr = device, config.optimizer.gradient_clip, config.optimizer.lr
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, config.optimizer.weight_decay),
            lr=lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )

    @property
    def num_parameters(self) -> int:
        """Trained parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, inputs: PeerInputs, chunks: int, gathers: bool = False) -> None:
        """Forward and backward over the rows in ``chunks`` parts, then one update."""
        for part in zip(*(tensor.chunk(chunks) for tensor in inputs), strict=True):
            with torch.autocast(self._device, torch.bfloat16):
                loss = self.model(*part, gathers) / chunks
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peer_inputs(batch: MicroBatch) -> PeerInputs:
    """What the peer reads of a micro-batch whose rows are one piece each."""
    masking = batch.masking
    return batch.token_ids_BT, masking.generator_ids_BT, batch.token_types_BT, masking.positions_BM


def _hf_config(model: ModelConfig, shape: EncoderShape, vocab_size: int, attention: str) -> ElectraConfig:
    return ElectraConfig(
        vocab_size=vocab_size,
        embedding_size=model.embedding_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward_size,
        hidden_act="gelu",
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        max_position_embeddings=model.max_positions,
        layer_norm_eps=model.layer_norm_eps,
        attn_implementation=attention,
    )


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on LayerNorm and biases, as in the program."""
    plain = {name for name, _ in model.named_parameters() if "LayerNorm" in name or name.endswith("bias")}
    return [
        {"params": [p for n, p in model.named_parameters() if n not in plain], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if n in plain], "weight_decay": 0.0},
    ]
