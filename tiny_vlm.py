"""A small vision-language model for a CPU: half a million parameters, and the parts of a large one.

    picture > patches > encoder > projector > [image tokens, prompt, answer] > decoder > hidden

It stands behind the Policy protocol of ptdpo.py, with the same letters for shapes. A region is a
patch: R patches, and P prompt tokens, padded on the left. The *prefix* of S = R + P tokens is the
picture and the prompt. It is computed once for a group. Its keys and values are then repeated for
the G answers, in sampling as in training. Who sees whom:

                     prefix    answer so far
    prefix token     all       none             the prefix sees itself in both directions
    answer token     all       up to itself     padding is never seen
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 8  # pixels along a patch


@dataclass
class Prompt:
    """One encoded prompt: a picture [height, width, 3] as uint8, and the ids of its words."""

    pixels: torch.Tensor
    ids: list


class Block(nn.Module):
    """A pre-norm transformer block that can show its attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        up = nn.Linear(width, 4 * width)
        down = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        # A block begins as the identity.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(down.weight)

    def forward(self, x, mask=None, past=None, show=False):
        """x [B, Q, H] -> x [B, Q, H], keys and values, attention.

        mask: who sees whom, bool [B, 1, Q, K]; past: keys and values of the tokens before. The
        attention [B, Q, K] is a mean over heads, None unless it is to be shown. Fast attention
        never shows its weights, so softmax(q k' / sqrt d) is computed once more.
        """
        B, Q, H = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, Q, 3, self.heads, H // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, Q, d]
        if past is not None:
            k = torch.cat([past[0], k], 2)
            v = torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attention = None
        if show:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            attention = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, Q, H))
        return x + self.mlp(self.norm2(x)), (k, v), attention


class TinyVLM(nn.Module):
    """The policy of the toy. words[0] ends an answer; cells are the words for the patches."""

    stop_ids = (0,)
    suppress_ids = ()

    def __init__(self, words, cells, side, width=96, heads=4, layers=3, longest=64):
        super().__init__()
        self.words = words
        self.cells = cells
        self.side = side
        self.num_layers = layers
        self.word_id = {word: i for i, word in enumerate(words)}
        into = nn.Linear(3 * PATCH**2, 2 * width)
        out = nn.Linear(2 * width, width)
        self.patches = nn.Sequential(into, nn.GELU(), out)
        self.encoder = nn.ModuleList([Block(width, heads)])
        self.projector = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(len(words), width)
        self.position = nn.Parameter(0.05 * torch.randn(longest, width))
        self.decoder = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        # The scale at the start decides how fast colours are learned: image tokens must not drown
        # the words.
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.constant_(self.projector[1].weight, 0.15)

    @property
    def head_weight(self):
        """The language head [V, H], tied to the word embedding."""
        return self.embed.weight

    def head(self):
        """The same: there is one precision."""
        return self.embed.weight

    def frozen_copy(self):
        """The reference."""
        return copy.deepcopy(self).requires_grad_(False)

    def region_names(self, prompt):
        """The cells: every patch has a word."""
        return self.cells

    def tokens(self, text):
        """Words to ids."""
        return [self.word_id[word] for word in text.split()]

    def text(self, ids):
        """Ids to words."""
        return " ".join(self.words[i] for i in ids)

    def encode(self, problem, hint="", like=None):
        """One Prompt. The hint follows the question; `like` lends its pixels."""
        ids = self.tokens(f"{problem.question} {hint}")
        if like:
            return Prompt(like.pixels, ids)
        edge = self.side * PATCH
        raw = bytearray(problem.images[0].tobytes())
        return Prompt(torch.frombuffer(raw, dtype=torch.uint8).view(edge, edge, 3), ids)

    def prefix(self, prompts):
        """Pictures and prompts -> hidden of the last token [B, 1, H]; by layer, keys and values and
        the attention of the last token [B, 1, S]; visible tokens, bool [B, S]; lengths [B].
        """
        B = len(prompts)
        s = self.side
        pixels = torch.stack([prompt.pixels for prompt in prompts]).view(B, s, PATCH, s, PATCH, 3)
        patches = pixels.transpose(2, 3).reshape(B, s * s, -1).to(self.position) / 127.5 - 1
        # One vector is the place of a patch and the word for it: so pointing is learned quickly.
        cells = self.embed(torch.tensor(self.tokens(" ".join(self.cells))))
        image = self.patches(patches) + cells
        for block in self.encoder:
            image, _, _ = block(image)
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        P = int(lengths.max())
        ids = torch.tensor([[0] * (P - len(prompt.ids)) + prompt.ids for prompt in prompts])
        # Positions count from the first real word, so it does not matter what shares the batch.
        place = torch.arange(P) - (P - lengths[:, None])  # [B, P], negative in padding
        words = self.embed(ids) + self.position[place.clamp_min(0)]
        # The words for the cells once more: what the decoder attends to, it can name.
        x = torch.cat([self.projector(image) + cells, words], 1)
        visible = torch.cat([torch.ones(B, s * s, dtype=torch.bool), place >= 0], 1)
        mask = visible[:, None, None].expand(-1, -1, x.shape[1], -1)
        pasts = []
        looks = []
        for block in self.decoder:
            x, past, attention = block(x, mask, show=True)
            pasts.append(past)
            looks.append(attention[:, -1:])
        return self.norm(x[:, -1:]), pasts, looks, visible, lengths

    @torch.no_grad()
    def sample(self, prompts, uniforms, greedy=False):
        """G answers to each prompt, ids [N, T], by uniform numbers [N, T]."""
        N, T = uniforms.shape
        repeats = N // len(prompts)
        hidden, pasts, _, visible, lengths = self.prefix(prompts)
        hidden = hidden.repeat_interleave(repeats, 0)
        pasts = repeat(pasts, repeats)
        mask = visible.repeat_interleave(repeats, 0)[:, None, None]  # [N, 1, 1, S]
        lengths = lengths.repeat_interleave(repeats)
        ids = torch.zeros(N, T, dtype=torch.long)
        running = torch.ones(N, dtype=torch.bool)
        for t in range(T):
            # One column for each answer: all that came before is in the keys and values.
            token = pick(hidden[:, 0] @ self.head_weight.T, uniforms[:, t], greedy)
            ids[:, t] = token * running  # behind its end an answer is padded with 0
            running = running & (token != 0)
            # What would follow the last token, or the end of the last answer, is not needed.
            if t == T - 1 or not running.any():
                break
            x = self.embed(token)[:, None] + self.position[lengths + t][:, None]
            mask = F.pad(mask, (0, 1), value=True)
            for i, block in enumerate(self.decoder):
                x, pasts[i], _ = block(x, mask, pasts[i])
            hidden = self.norm(x)
        return ids

    def forward(self, prompts, completion, mask, layers=()):
        """Read given answers -> hidden [N, T, H], attention to the patches [B] of [L, G, R].

        hidden[:, t] predicts token t. The attention is a mean over heads and the tokens in mask.
        """
        N, T = completion.shape
        repeats = N // len(prompts)
        hidden, pasts, first_looks, visible, lengths = self.prefix(prompts)
        # The last token of the prefix predicts the first token of all answers.
        hidden = hidden.repeat_interleave(repeats, 0)
        pasts = repeat(pasts, repeats)
        places = lengths.repeat_interleave(repeats)[:, None] + torch.arange(T - 1)
        x = self.embed(completion[:, :-1]) + self.position[places]
        before = visible.repeat_interleave(repeats, 0)[:, None].expand(-1, T - 1, -1)
        # All tokens at once: each sees the prefix, and of its answer what came before.
        causal = torch.ones(T - 1, T - 1, dtype=torch.bool).tril().expand(N, -1, -1)
        seen = torch.cat([before, causal], 2)[:, None]
        looks = []
        for i, block in enumerate(self.decoder):
            x, _, attention = block(x, seen, pasts[i], show=i in layers)
            if i in layers:
                first = first_looks[i].repeat_interleave(repeats, 0)
                R = self.side**2
                to_patches = torch.cat([first[..., :R], attention[..., :R]], 1)  # [N, T, R]
                weights = mask / mask.sum(1, keepdim=True)
                looks.append((to_patches * weights[..., None]).sum(1))
        hidden = torch.cat([hidden, self.norm(x)], 1)
        return hidden, list(torch.stack(looks).split(repeats, 1)) if looks else []


def pick(logits, uniforms, greedy):
    """Tokens [N]: the likeliest, or the first whose cumulative probability exceeds u [N]."""
    if greedy:
        return logits.argmax(-1)
    # In double: over 150,000 words the sum of float32 would be off by more than a rare word has.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    below = cumulative <= uniforms[:, None] * cumulative[:, -1:]
    return below.sum(-1).clamp_max(logits.shape[-1] - 1)  # rounding may not point beyond the last


def repeat(pasts, times):
    """Keys and values of each layer, once for each answer of a group."""
    return [[x.repeat_interleave(times, 0) for x in past] for past in pasts]
