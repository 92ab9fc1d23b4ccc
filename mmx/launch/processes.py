"""Several processes for one run: who they are, how they meet, and what is said when one of them is gone.

JAX's runtime ends a process by abort and a page of C++ log when another one dies. So the run stands in a child process,
and its parent, which holds no JAX, reads that page and says it in a line. The parent hands SIGTERM on, to which JAX's
preemption service listens: it lets all processes stop at the same step.
"""
import collections
import contextlib
import dataclasses
import glob
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import traceback

from mmx.config import ConfigError

HEARTBEAT = 30      # seconds of silence after which a process counts as dead
LEAVE = 10          # seconds that a process which failed waits for others that failed alike
DEAD = 3            # the exit code where another process died or left
LAUNCHERS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri"}    # how many, where
PODS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
LINE = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] |[A-Z]+:(absl):")        # native code's, Orbax's
RUNTIME = {"absl", "client", "service", "coordination_service", "coordination_service_agent", "preemption_notifier",
           "preemption_sync_manager"}
OTHERS = re.compile("Gloo|NCCL|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")
NOISE = "WARNING: All log messages before absl::InitializeLog"
# of "[Gloo] Rank 0 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7", which threads write in parts
GLOO = re.compile(r"(\[Gloo\]|Rank|is connected to|(Expected number of connected )?peer ranks\.?|is :|\d+|\s)+")


@dataclasses.dataclass(frozen=True)
class World:
    """What arguments or the environment say of the processes; None is for JAX to find out."""
    where: str
    timeout: int
    processes: int | None = None
    process: int | None = None
    coordinator: str | None = None


def find_world(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> World | None:
    """The processes that the arguments name, or else the environment; None for one alone."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _environment(timeout)
    if missing:
        raise ConfigError(f"{', '.join(given)} go together: {missing[0]} is missing")
    if not (parts := re.fullmatch(r".+:(\d{1,5})", coordinator)) or int(parts[1]) > 65535:
        raise ConfigError(f"--coordinator={coordinator} is no HOST:PORT of process 0, such as 10.0.0.1:9000")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} is not among --processes={processes}, which count from 0")
    return World(coordinator, timeout, processes, process, coordinator) if processes > 1 else None


def _environment(timeout: int) -> World | None:
    """Where JAX may find several processes: what costs nothing to see, for one alone starts as if this were not here."""
    env = os.environ
    for count, place in LAUNCHERS.items():
        if place in env and int(env.get(count, 1)) > 1:
            return World(f"the coordinator of {place}={env[place]}", timeout, int(env[count]))
    for name in PODS:
        if "," in env.get(name, "") or (name in env and int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1):
            return World(f"the coordinator of {name}={env[name]}", timeout)
    if "JOB_COMPLETION_INDEX" in env:
        return World("the coordinator of the Kubernetes job", timeout)
    if "TPU_SKIP_MDS_QUERY" not in env and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return World("the coordinator of the TPU's metadata", timeout)
    return None


def join(world: World) -> None:
    """Meets the other processes; raises ConfigError where they do not all come."""
    if world.coordinator:
        _roll_call(world)
    import jax

    try:
        jax.distributed.initialize(
            world.coordinator, world.processes, world.process, initialization_timeout=world.timeout,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
            cluster_detection_method="deactivate" if world.coordinator else None)
    except (OSError, ValueError) as error:      # JAX found no cluster
        if world.processes:
            raise ConfigError(f"{world.where}: {error}") from None
    except RuntimeError as error:
        raise ConfigError(f"{world.where}: {error}") from None


def _roll_call(world: World) -> None:
    """All meet at the coordinator's address before JAX listens there, and all are told who did not come."""
    host, port = world.coordinator.rsplit(":", 1)
    until = time.monotonic() + world.timeout
    problem = _call(world, int(port), until) if world.process == 0 else _answer(world, (host.strip("[]"), int(port)), until)
    if problem:
        raise ConfigError(problem)


def _call(world: World, port: int, until: float) -> str:
    """Process 0's part: what is wrong with the roll, which it tells all that are here."""
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        return f"process 0 cannot listen at port {port} of --coordinator={world.coordinator}: {os.strerror(error.errno)}"
    here, connections, problem = {0}, [], ""
    with server:
        while len(here) < world.processes and not problem and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                process, processes = json.loads(connection.makefile().readline(100))
                process, processes = int(process), int(processes)
            except (OSError, ValueError, TypeError, OverflowError, RecursionError):     # time is up, or it was another's call
                continue
            if processes != world.processes:
                problem = f"process {process} was started with --processes={processes}, process 0 with {world.processes}"
            elif process in here:
                problem = f"two processes were started with --process={process}"
            here.add(process)
            connections.append(connection)
    absent = [str(process) for process in range(world.processes) if process not in here]
    if absent and not problem:
        problem = f"{_of(absent)} of {world.processes} did not come to {world.coordinator} in {world.timeout} s"
    for connection in connections:
        with connection, contextlib.suppress(OSError):      # it may have died meanwhile
            connection.sendall(f"{problem}\n".encode())
    return problem


def _answer(world: World, address: tuple[str, int], until: float) -> str:
    """Another process's part: what process 0 says is wrong."""
    while True:
        try:
            connection = socket.create_connection(address, world.timeout)
            break
        except OSError as error:
            if time.monotonic() > until:
                return (f"nothing answers at {world.coordinator}, where process 0 should be, in {world.timeout} s "
                        f"({error.strerror or error})")
            time.sleep(0.2)
    with connection:
        connection.settimeout(2 * world.timeout)        # process 0 may have begun to wait later
        try:
            connection.sendall(f"[{world.process}, {world.processes}]\n".encode())
            said = connection.makefile().readline()
        except OSError:
            said = ""
    return said.strip() if said else f"process 0 at {world.coordinator} left before all processes had come"


def supervise(world: World, run) -> int:
    """`run()` in a child process; returns its exit code, or DEAD with a line of which process is gone."""
    alive, hold = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if not child:
        os.close(hold), os.close(said)
        _run(run, alive, say)
    os.close(alive), os.close(say)
    return _watch(world, child, said)


def _run(run, alive: int, say: int):
    """The child: what Python prints goes where it always went, what native code and the log print goes to the parent."""
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent makes one SIGTERM of it
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
        os.dup2(say, number)
    logging.basicConfig(stream=os.fdopen(say, "w", buffering=1))
    try:
        code = run()
    except BaseException as error:
        if _of_others(error):       # the runtime will say which, and end this process
            time.sleep(2 * HEARTBEAT)
        traceback.print_exc()
        code = 1
    if "jax" in sys.modules:        # all go together; who fails alone does not wait for ever
        last = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        last.start()
        last.join(LEAVE if code else None)
    os._exit(code)


def _of_others(error: BaseException | None) -> bool:
    """Whether an error may come of another process's end."""
    return error is not None and (bool(OTHERS.search(str(error))) or _of_others(error.__context__))


def _end_with_parent(alive: int):
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(world: World, child: int, log: int) -> int:
    """The parent: hands signals on, waits, and gives the verdict."""
    asked, held = [], collections.deque(maxlen=200)

    def hand_on(number, _):
        asked.append(number)
        os.kill(child, signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.SIGTERM)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping: all processes end after one step and save it; Ctrl-C once more quits at once\n")

    reader = threading.Thread(target=_pass_on, args=(log, held), daemon=True)
    reader.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(1)      # a grandchild may hold the other end
    if code >= 0 or signal.SIGINT in asked:
        return 130 if signal.SIGINT in asked else code
    said = "".join(held)
    if "RegisterTask" in said:
        print(f"mmx: not all processes came to {world.where} in {world.timeout} s", file=sys.stderr)
        return 2
    gone = _gone(said)
    print(*([] if gone else held), sep="", file=sys.stderr)     # ends the progress bar's line, too
    print(f"mmx: {gone or f'ended by {signal.Signals(-code).name}'}", file=sys.stderr)
    return DEAD if gone else 128 - code


def _pass_on(said: int, held):
    """Passes on what native code prints, but for mere information and what the runtime says of other processes: the
    latter is held."""
    shown, gloo = True, False
    with os.fdopen(said, errors="replace") as lines:
        for line in lines:
            if begin := LINE.match(line):       # what does not begin so goes on with the message before
                shown = begin[1] != "I" and (begin[2] or begin[3]) not in RUNTIME
            # a number or nothing is a part of it where one is before
            gloo = bool(not begin and GLOO.fullmatch(line) and (gloo or re.search("[a-z]", line)))
            if not shown:
                held.append(line)
            elif not gloo and not line.startswith(NOISE):
                print(line, end="", file=sys.stderr)


def _gone(said: str) -> str:
    """Which process is gone, by what the runtime said when it ended this one."""
    if match := re.search(r"stopped sending heartbeats\):([\d\s,]+)", said):
        who = f"{_of(re.findall(r'[0-9]+', match[1]))} died: no sign of life for {HEARTBEAT} s"
    elif match := re.search(r"first task at the barrier: (\d+)", said):
        who = f"process {match[1]} ended before the others, as it says itself"
    elif "Failed to send RPC" in said:
        who = "process 0, the coordinator, died or left"
    elif match := re.search(r"detected fatal errors.*absl::Status: (.+)", said):
        who = f"another process failed ({match[1]})"
    else:
        return ""
    return f"{who}; this process ends too, and the same command goes on from the last checkpoint"


def _of(numbers: list[str]) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"
