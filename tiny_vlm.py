"""A vision-language model for a CPU: the parts of a large one, with half a million parameters.

    picture > patches > encoder > projector > [image tokens; prompt; answers] > decoder > hidden

It implements the `Policy` protocol of ptdpo.py. One layout serves sampling and training, the
*packed row*: the G answers of a group stand behind a single picture and prompt, in order of time,

    I image tokens | P prompt tokens, padded on the left | token 0 of answers 1..G | token 1 of ...

and every answer sees the picture, the prompt and its own past. So picture and prompt are computed
once for a group, in the rollout, where the row grows by G columns a token, and in the update alike.

Shapes as in ptdpo.py; here R = I, a region is a patch, and S = I + P is the length of a prefix.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 8  # pixels along a patch


@dataclass
class Prompt:
    """One encoded prompt: picture [height, width, 3] as uint8, and the ids of question and hint."""

    pixels: torch.Tensor
    ids: list


class Block(nn.Module):
    """A pre-norm transformer block that can show its attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        nn.init.zeros_(self.out.weight)  # a block begins as the identity
        nn.init.zeros_(down.weight)

    def forward(self, x, seen=None, past=None, rows=None):
        """x [B, Q, H]; seen bool [B, 1, Q, K], who sees whom; past: keys and values of the columns
        before. Returns x, (keys, values), attention of `rows` [B, rows, K] as the mean of heads.

        Attention that is fast never shows its weights: softmax(q k' / sqrt d) is computed once
        more, for the rows and layers that are asked for.
        """
        B, Q, H = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, Q, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, Q, H))
        attention = None
        if rows is not None:
            scores = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            attention = scores.masked_fill(~seen[:, :, rows], -torch.inf).softmax(-1).mean(1)
        return x + self.mlp(self.norm2(x)), (k, v), attention


class TinyVLM(nn.Module):
    """The toy `Policy`. words[0] ends an answer; cells are the words that name the patches."""

    stop_ids, suppress_ids = (0,), ()

    def __init__(self, words, cells, side, width=96, heads=4, encoder=1, decoder=3, longest=64):
        super().__init__()
        self.words, self.cells, self.side, self.num_layers = words, cells, side, decoder
        self.word_id = {word: i for i, word in enumerate(self.words)}
        self.cell_ids = torch.tensor([self.word_id[c] for c in cells])
        into, on = nn.Linear(3 * PATCH**2, 2 * width), nn.Linear(2 * width, width)
        self.patches = nn.Sequential(into, nn.GELU(), on)
        self.encoder = nn.ModuleList(Block(width, heads) for _ in range(encoder))
        self.projector = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(len(self.words), width)
        self.position = nn.Parameter(0.05 * torch.randn(longest, width))
        self.decoder = nn.ModuleList(Block(width, heads) for _ in range(decoder))
        self.norm = nn.LayerNorm(width)
        # The scale at the start decides how fast colours are learned: words must be heard, and
        # image tokens must not drown them.
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.constant_(self.projector[1].weight, 0.15)

    @property
    def head_weight(self):
        """The language head [V, H], tied to the word embedding."""
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
        """One Prompt; the hint follows the question, `like` lends its pixels."""
        raw, edge = bytearray(problem.images[0].tobytes()), self.side * PATCH
        pixels = torch.frombuffer(raw, dtype=torch.uint8).view(edge, edge, 3)
        return Prompt(like.pixels if like else pixels, self.tokens(f"{problem.question} {hint}"))

    def prefix(self, prompts):
        """Pictures and prompts as decoder input [B, S, H], visible columns [B, S], lengths [B].

        Padding is on the left and positions count from the first real token, so that what a
        prompt is batched with changes nothing but rounding.
        """
        B, s, longest = len(prompts), self.side, max(len(p.ids) for p in prompts)
        pixels = torch.stack([p.pixels for p in prompts]).view(B, s, PATCH, s, PATCH, 3)
        patches = pixels.transpose(2, 3).reshape(B, s * s, -1).float() / 127.5 - 1
        # One vector is the position of a patch and the word for it: pointing is quickly learned.
        cells = self.embed(self.cell_ids)
        x = self.patches(patches) + cells
        for block in self.encoder:
            x, _, _ = block(x)
        ids = torch.tensor([[0] * (longest - len(p.ids)) + p.ids for p in prompts])
        lengths = torch.tensor([len(p.ids) for p in prompts])
        place = torch.arange(longest) - (longest - lengths[:, None])  # [B, P], negative: padding
        words = self.embed(ids) + self.position[place.clamp_min(0)]
        visible = torch.cat([torch.ones(B, s * s, dtype=torch.bool), place >= 0], 1)
        return torch.cat([self.projector(x) + cells, words], 1), visible, lengths

    def answer_tokens(self, ids, lengths, times):
        """Answer tokens ids [B, n], at times [n] of their answers, as decoder input [B, n, H]."""
        return self.embed(ids) + self.position[lengths[:, None] + times]

    @torch.no_grad()
    def sample(self, prompts, uniforms, temperature=1.0):
        """Sample a group for each prompt; picture and prompt are read once. -> ids [N, T].

        uniforms [N, T] in [0, 1) pick each token by inverse cumulative probability: the first word
        v with p_0 + ... + p_v >= u. The row of a group grows by G columns, one an answer, a token.
        """
        B, (N, T) = len(prompts), uniforms.shape
        G, past, ids = N // B, [None] * self.num_layers, []
        x, visible, lengths = self.prefix(prompts)
        seen = visible[:, None, None].expand(B, 1, x.shape[1], -1)
        own, running = torch.eye(G, dtype=torch.bool).expand(B, 1, G, G), torch.ones(N).bool()
        for t in range(T):
            for i, block in enumerate(self.decoder):
                x, past[i], _ = block(x, seen, past[i])
            # The last row of the prefix predicts the first token of all G answers.
            logits = self.norm(x[:, -1:] if t == 0 else x) @ self.head_weight.T
            logits = logits.expand(B, G, -1).reshape(N, -1).double()
            token = logits.argmax(-1)
            if temperature > 0:
                below = (logits / temperature).softmax(-1).cumsum(-1) < uniforms[:, t : t + 1]
                token = below.sum(-1).clamp_max(len(self.words) - 1)
            ids.append(token)
            running = running & (token != 0)
            if not running.any():
                break
            x = self.answer_tokens(token.view(B, G), lengths, torch.full((G,), t))
            before = seen if t else seen[:, :, :1].expand(B, 1, G, -1)
            seen = torch.cat([before, own], -1)
        return F.pad(torch.stack(ids, 1), (0, T - len(ids)))

    def forward(self, prompts, completion, mask=None, layers=()):
        """Teacher-forced pass over completion [N, T] in packed rows.

        Returns hidden [N, T, H], whose place t predicts token t, and the attention of those places
        to the patches, mean over heads and over the tokens in mask [N, T]: [len(layers), N, R].
        """
        B, (N, T) = len(prompts), completion.shape
        G, I, times = N // B, self.side**2, torch.arange(T - 1)
        x, visible, lengths = self.prefix(prompts)
        S = x.shape[1]
        packed = completion[:, :-1].view(B, G, T - 1).transpose(1, 2).reshape(B, -1)
        x = torch.cat([x, self.answer_tokens(packed, lengths, times.repeat_interleave(G))], 1)
        seen = torch.zeros(B, x.shape[1], x.shape[1], dtype=torch.bool)
        seen[:, :, :S] = visible[:, None]  # the prefix sees itself in both directions
        seen[:, S:, S:] = torch.kron(torch.ones(T - 1, T - 1).tril(), torch.eye(G)).bool()
        # rows[t, g] predicts token t of answer g: the end of the prefix, then the token before.
        rows = torch.cat([torch.full((G,), S - 1), S + torch.arange((T - 1) * G)])

        def by_answer(v):
            """Rows in order of time [B, T*G, ...] -> [N, T, ...]."""
            return v.view(B, T, G, -1).transpose(1, 2).reshape(N, T, -1)

        looks = []
        for i, block in enumerate(self.decoder):
            x, _, attention = block(x, seen[:, None], rows=rows if i in layers else None)
            if i in layers:
                tokens = mask[..., None] / mask.sum(1)[:, None, None]
                looks.append((by_answer(attention[..., :I]) * tokens).sum(1))
        return by_answer(self.norm(x[:, rows])), torch.stack(looks) if looks else None
