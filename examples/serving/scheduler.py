"""Requests, pages, and the loop that serves them: continuous batching."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from .model import Group, Model, Paged, dense


class PagePool:
    """The free list of the cache's pages."""

    def __init__(self, pages: int) -> None:
        self.total, self.free, self.taken = pages, list(range(pages)), 0

    def take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise MemoryError(f"{count} pages wanted, {len(self.free)} of {self.total} are free")
        self.taken += count
        return [self.free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        if twice := set(pages) & set(self.free):
            raise ValueError(f"pages {sorted(twice)} are free already")
        self.free.extend(pages)


@dataclass
class Request:
    number: int
    arrival: int  # step of the loop
    prompt: list[int]
    wanted: int  # tokens to generate
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose k and v are in the cache

    def tokens(self) -> list[int]:
        return self.prompt + self.generated


def traffic(
    count: int, prompts: tuple[int, int], answers: tuple[int, int], vocabulary: int, seed: int = 0
) -> list[Request]:
    """Requests that arrive one after the other, of any length within the bounds."""
    chooser = random.Random(seed)
    arrival, requests = 0, []
    for number in range(count):
        prompt = [chooser.randrange(vocabulary) for _ in range(chooser.randint(*prompts))]
        requests.append(Request(number, arrival, prompt, chooser.randint(*answers)))
        arrival += chooser.choice((0, 1, 2, 4))
    return requests


class Engine:
    """A cache, what attends over it, and the requests that it serves."""

    def __init__(self, model: Model, cache: Paged, requests: list[Request], batch: int) -> None:
        self.model, self.cache, self.batch = model, cache, batch
        _, pages, self.page_size, *_ = cache.k.shape
        self.pool = PagePool(pages)
        self.waiting, self.running = deque(requests), list[Request]()
        self.finished: list[Request] = []
        self.steps = self.preempted = self.generated = 0
        self.seconds = 0.0

    def step(self) -> None:
        """Makes room, admits requests, generates one token for each that runs."""
        start = time.perf_counter()
        self.make_room()
        self.admit()
        if self.running:
            self.generate()
        self.steps += 1
        self.seconds += time.perf_counter() - start

    def missing(self, request: Request) -> int:
        """Pages that it lacks to hold all its tokens."""
        return -(-len(request.tokens()) // self.page_size) - len(request.pages)

    def make_room(self) -> None:
        """A page for each request whose last one is full. Where none is free, the request that came
        last gives up its pages and waits; its tokens are computed again when there is room."""
        for request in list(self.running):
            while request in self.running and self.missing(request) > len(self.pool.free):
                victim = self.running.pop()
                self.release(victim)
                self.waiting.appendleft(victim)
                self.preempted += 1
            if request in self.running:
                request.pages += self.pool.take(self.missing(request))

    def admit(self) -> None:
        """In order of arrival, while that leaves a page for others to grow into."""
        while self.waiting and len(self.running) < self.batch:
            request = self.waiting[0]
            full = self.running and self.missing(request) >= len(self.pool.free)
            if request.arrival > self.steps or full:
                return
            request.pages += self.pool.take(self.missing(request))
            self.running.append(self.waiting.popleft())

    def generate(self) -> None:
        prompts = [[r] for r in self.running if r.cached == 0]
        decoding = [r for r in self.running if r.cached > 0]  # with one new token each
        self.cache.groups, tokens, positions, last = [], list[int](), list[int](), list[int]()
        for members in [*prompts, decoding] if decoding else prompts:
            first = len(tokens)
            for r in members:
                tokens += r.tokens()[r.cached :]
                positions += range(r.cached, len(r.tokens()))
                last.append(len(tokens) - 1)
            self.cache.groups.append(self.group(members, slice(first, len(tokens))))
        logits = self.model(*map(torch.tensor, (tokens, positions, last)), self.cache)
        batch = [*(r for (r,) in prompts), *decoding]
        for r, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
            r.cached = len(r.tokens())
            r.generated.append(token)
            self.generated += 1
            if len(r.generated) == r.wanted:
                self.running.remove(r)
                self.release(r)
                self.finished.append(r)

    def group(self, members: list[Request], rows: slice) -> Group:
        columns = max(len(r.pages) for r in members)
        table = [r.pages + [0] * (columns - len(r.pages)) for r in members]  # 0: not read
        lengths, pages = ([r.cached for r in members], table)
        new = (rows.stop - rows.start) // len(members)
        return Group(rows, new, *(torch.tensor(x, dtype=torch.int32) for x in (lengths, pages)))

    def release(self, request: Request) -> None:
        self.pool.give_back(request.pages)
        request.pages, request.cached = [], 0


def verify(model: Model, requests: list[Request]) -> tuple[int, int, float, float]:
    """Recomputes each request by itself, dense: (tokens, how many are not the best, how far below
    the best one's logit at most, least distance of the best two)."""
    tokens, different, gap, margin = 0, 0, 0.0, float("inf")
    for r in requests:
        inputs = torch.tensor(r.tokens()[:-1])
        last = torch.arange(len(r.prompt) - 1, len(inputs))
        logits = model(inputs, torch.arange(len(inputs)), last, dense)
        best, second = logits.topk(2).values.T
        below = best - logits.gather(1, torch.tensor(r.generated)[:, None])[:, 0]
        tokens, different = tokens + len(below), different + int((below > 0).sum())
        gap, margin = max(gap, below.max().item()), min(margin, (best - second).min().item())
    return tokens, different, gap, margin
