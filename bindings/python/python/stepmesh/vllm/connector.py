"""The connector. A transfer is (stage, step·layer): the stage is the microbatch, a counter is the group, so that an FFN
instance's batch has every attention instance's rows of the same layer, whatever each of them does meanwhile."""

from __future__ import annotations

import struct
import time
from typing import Any, Mapping

import stepmesh

from .. import _streams
from .._arrays import framework
from ..errors import DeviceUnsupported, InvalidArgument, InvalidType, Timeout
from .control import StepMeshAFDControlPlane
from .graphs import AttentionGraphs, Capture, Captured, FfnGraphs, Sizes
from .settings import Settings, first, sizes
from .transfer import A2FPayload, F2APayload, TransferContext, TransferMetadata

try:
    from afd_plugin.connectors.base import AFDConnectorBase as _Base
except ImportError:
    _Base = object

#: Layer, stage, phase, speculative step: what travels beside the tensors.
_APP = struct.Struct("<iHBBii")
_DECODER, _MTP, _HELLO = 0, 1, 2
#: Bytes of a control payload.
_CONTROL_BYTES = 1 << 20
#: Seconds between two looks at who is still there.
_LOOK = 0.2


def _is_torch(tensor: Any) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torch" or hasattr(tensor, "is_cuda")


def _name(kind: Any) -> str:
    return str(kind).rpartition(".")[2]


def _cuda_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _fill(slot: Any, tensor: Any) -> None:
    """Copies into a slot: from any device PyTorch knows, or from NumPy's memory."""
    if slot.nbytes == 0:
        return
    if _is_torch(tensor):
        stepmesh.torch(slot).copy_(tensor)
    else:
        stepmesh.numpy(slot)[...] = tensor.view(stepmesh.numpy(slot).dtype)


def _view(slot: Any, torch: bool) -> Any:
    return stepmesh.torch(slot) if torch else stepmesh.numpy(slot)


def _joined(tensors: list[Any], torch: bool) -> Any:
    """One after the other; a copy unless there is one."""
    if len(tensors) == 1:
        return tensors[0]
    if torch:
        import torch as framework

        return framework.cat(tensors)
    import numpy

    return numpy.concatenate(tensors)


class StepMeshAFDConnector(_Base):
    """Hidden states between vLLM's attention and FFN workers: any ratio, any number of stages, steps without tokens, the
    router on either side. Works with tensors on the CPU, on a GPU through host memory, and with slots on the GPU (``gpu``),
    where its transfers can be captured in CUDA graphs."""

    control_plane: StepMeshAFDControlPlane | None = None

    @classmethod
    def parse_extra_config(cls, raw: Mapping[str, Any] | None) -> Settings:
        """The plugin's hook for its ``connector_extra_config``."""
        return Settings.from_mapping(raw)

    def __init__(
        self, rank: int, local_rank: int, config: Any, afd_config: Any = None, role_rank: int | None = None
    ) -> None:
        afd = afd_config if afd_config is not None else first(config, "afd_config") or config
        if _Base is not object and afd_config is not None:
            super().__init__(rank, local_rank, config, afd_config, role_rank)
        else:
            self.rank, self.local_rank, self.vllm_config, self.afd_config = rank, local_rank, config, afd
            self.extra_info = self.parse_extra_config(first(afd, "afd_extra_config", "connector_extra_config"))
        settings: Settings = self.extra_info  # type: ignore[assignment]
        self.settings = settings
        role = first(afd, "role", "afd_role")
        if role not in ("attention", "ffn"):
            raise InvalidArgument(f"role: {role!r}: attention or ffn")
        self.role: str = role
        self.attn_size, self.ffn_size = sizes(afd)
        given = role_rank if role_rank is not None else first(afd, "afd_server_rank")
        self.role_rank = int(rank if given is None else given)
        self.host = str(first(afd, "host", "afd_host") or "127.0.0.1")
        self.port = int(first(afd, "port", "afd_port") or 1239)
        self.stages = int(settings.num_stages or first(afd, "num_afd_stages") or 3)
        self.hidden_size = int(settings.hidden_size or first(config, "model_config.hf_config.hidden_size") or 0)
        tokens = settings.max_tokens or first(config, "scheduler_config.max_num_batched_tokens")
        self.max_tokens = int(tokens or 0)
        for name, value in [("hidden_size", self.hidden_size), ("max_tokens", self.max_tokens)]:
            if value <= 0:
                raise InvalidArgument(f"{name}: vLLM's configuration does not say it: set it in connector_extra_config")
        experts = first(config, "model_config.hf_config.n_routed_experts", "model_config.hf_config.num_experts")
        columns = settings.router_columns
        if columns is None:
            columns = int(experts or 0) if first(afd, "compute_gate_on_attention") else 0
        self.router_columns = columns
        self.reduce = settings.reduce or ("paired" if hasattr(afd, "num_ffn_ranks") else "sum")
        self.control_plane = StepMeshAFDControlPlane(self) if settings.control_plane else None
        self._mesh: Any = None
        self._scheduler: Any = None
        self._under_way: dict[int, tuple[Any, Any, int]] = {}
        self._torch = framework(settings.tensors) == "torch"
        self._gpu = None if settings.gpu is None else (local_rank if settings.gpu is True else int(settings.gpu))
        # Where received tensors are put.
        self._device = "cpu"
        if self._torch and (self._gpu is not None or _cuda_is_here()):
            self._device = f"cuda:{local_rank if self._gpu is None else self._gpu}"
        self._kind = _name(first(config, "model_config.dtype") or "bfloat16")
        layers = int(first(config, "model_config.hf_config.num_hidden_layers") or 128)
        self._transfers = (layers + 8) * self.stages
        self._graphs: Any = None

    # ---- life ----

    @property
    def is_initialized(self) -> bool:
        return self._mesh is not None

    def init_afd_connector(self) -> None:
        """Joins, and returns when every attention and FFN instance has come. FFN rank 0 brings the scheduler."""
        if self._mesh is not None:
            return
        loopback = self.host.startswith("127.") or self.host == "localhost"
        transport = self.settings.transport or ("shm" if loopback else "tcp")
        listen = "127.0.0.1" if self.host == "localhost" else self.host
        if self.role == "ffn" and self.role_rank == 0:
            self._scheduler = stepmesh.Scheduler(
                self.attn_size,
                self.ffn_size,
                listen=f"{listen}:{self.port}",
                token=self.settings.token,
                insecure=self.settings.insecure,
            )
        row_bytes = self.hidden_size * self.settings.element_bytes
        hidden = stepmesh.PartSpec(row_bytes, max(self.max_tokens, -(-_CONTROL_BYTES // row_bytes)))
        more = [
            stepmesh.PartSpec(max(4 * self.router_columns, 1), self.max_tokens),
            stepmesh.PartSpec(8, self.max_tokens),
        ]
        output = stepmesh.PartSpec(row_bytes, self.max_tokens)
        options = stepmesh.Options(
            scheduler=f"http://{listen}:{self.port}",
            layout=stepmesh.Layout([hidden, *more], [output, output], self.stages + 1),
            transport=transport,  # type: ignore[arg-type]
            token=self.settings.token,
            name=f"vllm {self.role}",
            workload=f"vllm {self.hidden_size} {self.reduce}",
            rank=self.role_rank,
            lanes=self.settings.lanes,
            address=self.settings.address,
            devices=self.settings.devices,
            gpu=self._gpu,
            spin_us=self.settings.spin_us,
            progress=self.settings.progress or self._progress(transport),  # type: ignore[arg-type]
            memory_limit_bytes=1 << 40,
            join_timeout=self.settings.timeout,
        )
        try:
            self._mesh = stepmesh.AttentionMesh(options) if self.role == "attention" else stepmesh.FfnMesh(options)
            self._mesh.wait_complete(self.settings.timeout)
            self._greet()
            if self._gpu is not None:
                spin_us, timeout = max(self.settings.spin_us, 1000), self.settings.timeout
                provided = Sizes(self._transfers, self.settings.graphs, self._gpu, timeout, spin_us)
                attention = self.role == "attention"
                self._graphs = (
                    AttentionGraphs(self._mesh, provided)
                    if attention
                    else FfnGraphs(self._mesh, provided, self._is_ours)
                )
        except BaseException:
            self.close()
            raise

    def _progress(self, transport: str) -> str:
        # Captured steps drive the member themselves.
        return "thread" if transport == "tcp" and self._gpu is None else "caller"

    def _greet(self) -> None:
        """Once through every microbatch without rows: from then on an FFN instance waits for all attention instances."""
        if self.role == "attention":
            tickets = []
            for microbatch in range(self.stages + 1):
                buffer = self._mesh.acquire(microbatch, self.settings.timeout)
                tickets.append(self._mesh.push_pull(buffer, [], 0, _APP.pack(-1, microbatch, _HELLO, 0, 0, 0)))
            for ticket in tickets:
                self._mesh.wait(ticket, self.settings.timeout)
            return
        missing, batches = self.attn_size * (self.stages + 1), []
        while missing > 0:
            batch = self._mesh.next_batch("any", self.settings.timeout)
            if batch is None:
                raise Timeout(f"{missing} greetings of attention instances are missing")
            missing -= len(batch)
            batches.append(batch)
        for batch in batches:
            self._mesh.respond(batch)

    def close(self) -> None:
        """Leaves. May be called again."""
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.close()
        mesh, self._mesh = self._mesh, None
        if mesh is not None:
            mesh.close()
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()
        self._under_way.clear()

    def _joined(self, role: str) -> Any:
        if self._mesh is None:
            raise stepmesh.Closed("the connector is not initialized: call init_afd_connector() first")
        if self.role != role:
            raise stepmesh.WrongRole(f"this is the {self.role} side, and the call is the other side's")
        if self._graphs is not None:
            self._graphs.check()
        return self._mesh

    def _capture(self) -> Capture | None:
        """The capture of the engine's stream, if it is being captured."""
        if self._graphs is not None:
            return self._graphs.capture()
        if self._device != "cpu" and _streams.is_capturing(self.local_rank):
            raise DeviceUnsupported(
                "a transfer through host memory cannot be captured in a CUDA graph: set `gpu` in connector_extra_config, or "
                "run the AFD layers eagerly"
            )
        return None

    def _settle(self) -> None:
        """Has what the slots on the GPU were filled with be there before a descriptor says so."""
        if self._gpu is not None:
            _streams.finish(self._gpu)

    # ---- attention side ----

    def send_attn_output(self, hidden_states: Any, context: Any, **more: Any) -> int:
        """Sends ``[tokens, hidden]`` to every FFN instance, with ``router_logits`` and ``input_ids`` if given. Returns a
        handle for ``recv_ffn_output``: the stage."""
        mesh = self._joined("attention")
        metadata = getattr(context, "metadata", context)
        stage = int(metadata.stage_idx)
        if not 0 <= stage < self.stages:
            raise InvalidArgument(f"stage_idx: {stage} of {self.stages} stages: raise num_stages")
        tokens = self._check("hidden_states", hidden_states, self.hidden_size)
        parts = [(0, "hidden_states", hidden_states)]
        for part, name in ((1, "router_logits"), (2, "input_ids")):
            if more.get(name) is not None:
                if len(more[name]) != tokens:
                    raise InvalidArgument(f"{name}: {len(more[name])} rows for {tokens} tokens")
                parts.append((part, name, more[name]))
        capture = self._capture()
        before = self._under_way.get(stage)
        # What another capture has sent and not received was given up with it.
        if before is not None and (not isinstance(before[0], Capture) or before[0] == capture):
            raise InvalidArgument(f"stage_idx: {stage} is under way: recv_ffn_output first")
        phase = _MTP if getattr(metadata, "phase", "decoder") == "mtp" else _DECODER
        step = int(getattr(metadata, "speculative_step", 0))
        app = _APP.pack(int(metadata.layer_idx), stage, phase, 0, step, tokens)
        if capture is not None:
            tensors: list[Any] = [None] * 3
            for part, _, tensor in parts:
                tensors[part] = tensor
            self._graphs.send(capture, stage, tensors, app)
            self._under_way[stage] = (capture, hidden_states, tokens)
            return stage
        buffer = mesh.acquire(stage, self.settings.timeout)
        try:
            said = [stepmesh.Part(0, 1)] * 3
            for part, name, tensor in parts:
                said[part] = self._put(buffer.tensor, part, name, tensor)
            self._settle()
        except BaseException:
            buffer.release()
            raise
        # All attention instances count alike, so that equal groups are the same layer of the same step.
        ticket = mesh.push_pull(buffer, said, None, app)
        self._under_way[stage] = (ticket, hidden_states, tokens)
        return stage

    def recv_ffn_output(
        self, ref_tensor: Any = None, ubatch_idx: int = 0, timeout_ms: float | None = None, **_more: Any
    ) -> Any:
        """The FFN output of a stage, ``[tokens, hidden]``, in ``ref_tensor`` if one is given. For the draft's callers the
        first argument may be the handle instead."""
        mesh = self._joined("attention")
        if isinstance(ref_tensor, int):
            ref_tensor, ubatch_idx = None, ref_tensor
        if ubatch_idx not in self._under_way:
            raise stepmesh.UnknownTicket(f"ubatch_idx: nothing was sent for stage {ubatch_idx}")
        ticket, sent, tokens = self._under_way[ubatch_idx]
        if isinstance(ticket, Capture):
            del self._under_way[ubatch_idx]
            ranks = [rank for rank in range(self.ffn_size) if self._answers(rank)]
            return self._graphs.receive(ticket, ubatch_idx, sent, ranks, ref_tensor)
        timeout = self.settings.timeout if timeout_ms is None else timeout_ms / 1e3
        try:
            reply = mesh.wait(ticket, timeout)
        except Timeout:
            raise
        except BaseException:
            del self._under_way[ubatch_idx]
            raise
        del self._under_way[ubatch_idx]
        outputs = [self._sum(reply, part, sent, tokens, ref_tensor if part == 0 else None) for part in (0, 1)]
        return outputs[0] if outputs[1] is None else F2APayload(outputs[0], outputs[1])

    def _sum(self, reply: Any, part: int, sent: Any, tokens: int, out: Any) -> Any:
        """The answers of all FFN instances, added up in rank order, where the tensor that was sent lies."""
        torch = _is_torch(sent)
        present = [rank for rank in range(len(reply)) if len(reply.parts(rank)) > part]
        answers = [_view(reply.tensor(rank, part), torch) for rank in present]
        answers = [answer for answer in answers if len(answer) == tokens]
        if not answers:
            if part == 0 and tokens > 0:
                raise stepmesh.PeerFailed("no FFN instance answered with an output: check `reduce` on both sides")
            return None if part > 0 else (sent[:0] if out is None else out)
        total = answers[0] if len(answers) == 1 else sum(answers[1:], start=answers[0])
        if out is None:
            return total.to(sent.device, copy=True) if torch else total.copy()
        if torch:
            out.copy_(total)
        else:
            out[...] = total
        return out

    # ---- FFN side ----

    def recv_attn_output(
        self, ubatch_idx: int | None = None, timeout_ms: float | None = None, **more: Any
    ) -> A2FPayload:
        """The hidden states of one (layer, stage), those of all attention instances one after the other in rank order:
        ``context.metadata.seq_lens`` says how many of each. Of the stage given, or of whichever is first."""
        self._joined("ffn")
        timeout = self.settings.timeout if timeout_ms is None else timeout_ms / 1e3
        if (capture := self._capture()) is not None:
            return self._receive_captured(capture, ubatch_idx, more)
        batch = self._next(ubatch_idx, timeout)
        like = more.get("like")
        torch = self._torch if like is None else _is_torch(like)
        own = [segment for segment in batch if self._is_ours(segment.rank)]
        layer, stage, phase, _, step, _ = _APP.unpack(batch[0].app)
        tensors: list[list[Any]] = [[], [], []]
        lengths = []
        for segment in own:
            lengths.append(segment.parts[0].rows)
            for part in range(3):
                if part == 0 or segment.parts[part].rows:
                    tensors[part].append(self._of_part(segment, part, torch))
        if not own:  # Other FFN instances answer all of these.
            tensors[0].append(self._of_part(batch[0], 0, torch)[:0])
        hidden, logits, ids = (_joined(some, torch) if some else None for some in tensors)
        name = "mtp" if phase == _MTP else "decoder"
        metadata = TransferMetadata(layer, stage, lengths, name, step)
        if ids is not None:
            ids = ids.reshape(-1)
        return A2FPayload(hidden, TransferContext(metadata, batch), logits, ids)

    def _receive_captured(self, capture: Capture, stage: int | None, more: Mapping[str, Any]) -> A2FPayload:
        """What ``recv_attn_output`` puts into a graph: the rows are those that the control plane has announced."""
        if stage is None:
            raise InvalidArgument("ubatch_idx: a captured step names its stage")
        tokens = None if self.control_plane is None else self.control_plane.tokens(stage, self.attn_size)
        if tokens is None:
            raise InvalidArgument(
                "a captured step takes each attention instance's rows from the control plane: call its "
                "update_state_from_dp_metadata() before the capture"
            )
        columns, routing = [(self.hidden_size, self._kind)], more.get("routing_spec")
        if routing is not None:
            columns.append((int(routing.router_logits_width), _name(routing.router_logits_dtype)))
        captured, slots = self._graphs.receive(capture, stage, tokens, columns)
        views = [[self._view_of(slot, True) for slot in part] for part in slots]
        lengths = list(captured.rows.values())
        if not lengths:  # Other FFN instances answer all of these.
            views = [[stepmesh.torch(self._mesh.request_tensor(0, stage, 0, [0, self.hidden_size], self._kind))]]
        hidden, logits = (_joined(part, True) for part in (views + [[None]])[:2])
        metadata = TransferMetadata(-1, stage, lengths)
        return A2FPayload(hidden, TransferContext(metadata, captured), logits)

    def send_ffn_output(self, ffn_output: Any, context: Any, **more: Any) -> None:
        """Answers: to each attention instance its rows. ``ffn_output`` may be a payload with a shared part."""
        mesh = self._joined("ffn")
        batch = getattr(context, "states", None)
        if batch is None:
            batch = more.get("batch")
        if isinstance(batch, Captured):
            if more.get("shared_output", getattr(ffn_output, "shared_output", None)) is not None:
                raise InvalidArgument("shared_output: a captured step has one output: add it to the other")
            capture = self._capture()
            if capture is None:
                raise InvalidArgument("context: its graph is not being captured any more")
            return self._graphs.send(capture, batch, getattr(ffn_output, "routed_output", ffn_output))
        if not isinstance(batch, stepmesh.Batch):
            raise InvalidArgument("context: it is not the one that recv_attn_output returned")
        if self._capture() is not None:
            raise InvalidArgument("context: it was received before the capture began")
        outputs = [
            getattr(ffn_output, "routed_output", ffn_output),
            more.get("shared_output", getattr(ffn_output, "shared_output", None)),
        ]
        own = [segment for segment in batch if self._is_ours(segment.rank)]
        lengths = [segment.parts[0].rows for segment in own]
        for part, output in enumerate(outputs):
            if output is not None and self._check("ffn_output", output, self.hidden_size) != sum(lengths):
                raise InvalidArgument(f"ffn_output: {len(output)} rows for {sum(lengths)} tokens")
        start = 0
        for segment, length in zip(own, lengths):
            said = []
            for part, output in enumerate(outputs):
                if output is not None:
                    rows = output[start : start + length]
                    said.append(self._put(segment.reply, part, "ffn_output", rows))
            segment.set_reply(said)
            start += length
        self._settle()
        mesh.respond(batch)

    def _is_ours(self, rank: int) -> bool:
        """Whether this FFN instance answers that attention rank."""
        return self.reduce == "sum" or rank % self.ffn_size == self.role_rank

    def _answers(self, rank: int) -> bool:
        """Whether that FFN rank answers this attention instance."""
        return self.reduce == "sum" or self.role_rank % self.ffn_size == rank

    def _next(self, stage: int | None, timeout: float) -> Any:
        """The next batch of a stage, or of any; those of others wait."""
        stages = range(self.stages) if stage is None else (stage,)
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            batch = self._mesh.next_batch("all", min(_LOOK, left), list(stages))
            if batch is not None:
                return batch
            self._look_for_losses()
            if time.monotonic() >= deadline:
                raise Timeout(f"nothing from the attention side after {timeout} s")

    def _look_for_losses(self) -> None:
        """Raises for an attention instance that is gone: what it was to send will never come."""
        if self._graphs is not None:
            self._graphs.check()
        while (event := self._mesh.next_event()) is not None:
            if event["kind"] == "peer_lost" and event["role"] == "attention":
                raise stepmesh.PeerLost(f"lost attention {event['rank']} ({event['name']}): {event['reason']}")

    # ---- the control plane's microbatch ----

    def send_control(self, payload: bytes) -> None:
        """To every FFN instance; returns as soon as it is on its way."""
        mesh = self._joined("attention")
        if self.stages in self._under_way:
            mesh.wait(self._under_way.pop(self.stages)[0], self.settings.timeout)
        buffer = mesh.acquire(self.stages, self.settings.timeout)
        try:
            part = self._put_bytes(buffer, payload)
        except BaseException:
            buffer.release()
            raise
        ticket = mesh.push_pull(buffer, [part], None)
        self._under_way[self.stages] = (ticket, None, 0)

    def receive_control(self) -> bytes:
        """The payload of the lowest rank, once all attention instances have sent theirs."""
        mesh = self._joined("ffn")
        batch = self._next(self.stages, self.settings.timeout)
        sent = batch[0].tensor(0)
        on_host = sent.device == "cpu"
        payload = bytes(stepmesh.memory(sent) if on_host else stepmesh.torch(sent.view(None, "uint8")).cpu().numpy())
        mesh.respond(batch)
        return payload

    # ---- tensors ----

    def _put_bytes(self, buffer: Any, payload: bytes) -> Any:
        if buffer.tensor(0).device == "cpu":
            return buffer.put(0, payload)
        import torch

        place = stepmesh.torch(buffer.tensor(0, [len(payload)], "uint8"))
        place.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        self._settle()
        return stepmesh.Part(1, len(payload))

    def _check(self, name: str, tensor: Any, columns: int) -> int:
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[1] != columns:
            raise InvalidArgument(f"{name}: shape {shape}, and [tokens, {columns}] is wanted")
        if shape[0] > self.max_tokens * (1 if self.role == "attention" else self.attn_size):
            raise InvalidArgument(f"{name}: {shape[0]} tokens, and a slot holds {self.max_tokens}: raise max_tokens")
        return shape[0]

    def _put(self, slot: Any, part: int, name: str, tensor: Any) -> Any:
        """Writes a tensor into a slot's part, and says what it is."""
        shape = list(tensor.shape)
        kind = _name(tensor.dtype)
        try:
            place = slot(part, shape, kind)
        except InvalidType:
            raise
        except InvalidArgument as error:
            raise InvalidArgument(f"{name}: {error}") from None
        _fill(place, tensor)
        row_bytes = tensor.element_size() if _is_torch(tensor) else tensor.itemsize
        for size in shape[1:]:
            row_bytes *= size
        return stepmesh.Part(shape[0], row_bytes, kind)

    def _of_part(self, segment: Any, part: int, torch: bool) -> Any:
        return self._view_of(segment.tensor(part), torch)

    def _view_of(self, slot: Any, torch: bool) -> Any:
        """What lies in a request's slot, on the model's device."""
        view = _view(slot, torch)
        if torch and self._device != slot.device:
            return view.to(self._device, non_blocking=self._gpu is not None)
        # On shm it is the attention instance's own memory, mapped read-only: PyTorch knows no such thing.
        return view.clone() if torch and slot.readonly else view
