"""Runs of several processes: how they find each other, how they stop, and the one-line message when one of them dies.

When a process dies, JAX's runtime aborts the others and prints a page of C++ log. So a run executes in a child process. Its
parent, which does not load JAX, reads that log and prints one line instead. The parent passes SIGTERM on to the child, where
JAX's preemption service listens to it: that service lets all processes stop at the same step.
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

HEARTBEAT_SECONDS = 30      # without a heartbeat, after which a process counts as dead
SHUTDOWN_SECONDS = 10       # that a failed process waits for the others to fail with the same error
DEAD = 3                    # the exit code when another process died or ended
# Of each launcher, the variable with the number of processes and the one from which JAX derives the coordinator's address.
LAUNCHERS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri"}
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
# The first line of a log message, of native code (severity, source file) or of Orbax.
LOG_LINE = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ (\w+)\.\w+:\d+\] |[A-Z]+:(absl):")
RUNTIME_FILES = {"absl", "client", "service", "coordination_service", "coordination_service_agent", "preemption_notifier",
                 "preemption_sync_manager"}     # source files of the messages about other processes
COMMUNICATION_ERROR = re.compile("Gloo|NCCL|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")
ABSL_WARNING = "WARNING: All log messages before absl::InitializeLog"
# Parts of "[Gloo] Rank 0 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7". Threads print these
# messages at the same time, so that their parts are mixed.
GLOO = re.compile(r"(\[Gloo\]|Rank|is connected to|(Expected number of connected )?peer ranks\.?|is :|\d+|\s)+")


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, as arguments or the environment give them; JAX finds out what is None."""
    where: str                          # the coordinator, in words
    timeout: int                        # seconds to wait for all processes
    variable: str = ""                  # of the environment, by which the processes were found
    processes: int | None = None
    process: int | None = None
    coordinator: str | None = None      # HOST:PORT


def find_world(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> World | None:
    """Returns the processes that the arguments or else the environment give; None for a run of one process.

    `processes` = 1 alone is one process, whatever the environment says.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if processes == 1 and coordinator is None and not process:
        return None
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _find_in_environment(timeout)
    if missing:
        raise ConfigError(f"{', '.join(given)} must be given together: {missing[0]} is missing")
    if not (parts := re.fullmatch(r".+:(\d{1,5})", coordinator)) or int(parts[1]) > 65535:
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:9000")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must be at least 0 and below --processes={processes}")
    return World(coordinator, timeout, "", processes, process, coordinator) if processes > 1 else None


def _find_in_environment(timeout: int) -> World | None:
    """Returns the processes that JAX may find through the environment.

    Only cheap checks, so that a run of one process starts without delay.
    """
    env = os.environ
    for count, address in LAUNCHERS.items():
        if address in env and (number := _count(count)) > 1:
            return World(f"the coordinator of {address}={env[address]}", timeout, count, number)
    for name in TPU_HOSTS:
        if "," in env.get(name, "") or (name in env and _count("MEGASCALE_NUM_SLICES") > 1):
            return World(f"the coordinator of {name}={env[name]}", timeout, name)
    if "JOB_COMPLETION_INDEX" in env:
        return World("the coordinator of the Kubernetes job", timeout, "JOB_COMPLETION_INDEX")
    if "TPU_SKIP_MDS_QUERY" not in env and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return World("the coordinator of the TPU's metadata", timeout)
    return None


def _count(name: str) -> int:
    """The number in a variable of the environment; 1 without it."""
    value = os.environ.get(name, "1")
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r:.200} in the environment must be a number of processes: unset it, or give "
                          "--processes 1 to train in one process")
    return int(value)


def advice(world: World) -> str:
    """How to train in one process, where the environment names more of them than the user may have started."""
    found = {name: os.environ[name] for name in [world.variable] if name in os.environ}
    return "".join(f"; {name}={value} in the environment asks for several processes: to train in one, unset it or give "
                   "--processes 1" for name, value in found.items())


def join(world: World) -> None:
    """Initializes jax.distributed; raises ConfigError if not all processes connect in time."""
    if world.coordinator:
        _roll_call(world)
    import jax

    try:
        jax.distributed.initialize(
            world.coordinator, world.processes, world.process, initialization_timeout=world.timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            cluster_detection_method="deactivate" if world.coordinator else None)
    except KeyError as error:       # a variable of the launcher is missing
        raise ConfigError(f"{world.where}: {error.args[0]} is not in the environment{advice(world)}") from None
    except (OSError, ValueError) as error:      # JAX found no cluster
        if world.processes:
            raise ConfigError(f"{world.where}: {error}{advice(world)}") from None
    except RuntimeError as error:
        raise ConfigError(f"{world.where}: {error}{advice(world)}") from None


def _roll_call(world: World) -> None:
    """Connects all processes to process 0 before JAX does, because JAX does not say which process is missing."""
    host, port = world.coordinator.rsplit(":", 1)
    deadline = time.monotonic() + world.timeout
    if world.process == 0:
        problem = _call_roll(world, int(port), deadline)
    else:
        problem = _answer_roll(world, (host.strip("[]"), int(port)), deadline)
    if problem:
        raise ConfigError(problem)


def _call_roll(world: World, port: int, deadline: float) -> str:
    """Process 0's part: waits for the others and sends them the problem, which it returns; "" if there is none."""
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        return f"process 0 cannot listen at port {port} of --coordinator={world.coordinator}: {os.strerror(error.errno)}"
    connected, connections, problem = {0}, [], ""
    with server:
        while len(connected) < world.processes and not problem and (seconds := deadline - time.monotonic()) > 0:
            server.settimeout(seconds)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                process, processes = json.loads(connection.makefile().readline(100))
                process, processes = int(process), int(processes)
            except (OSError, ValueError, TypeError, OverflowError, RecursionError):     # timeout, or a foreign program called
                continue
            if processes != world.processes:
                problem = f"process {process} was started with --processes={processes}, process 0 with {world.processes}"
            elif process in connected:
                problem = f"two processes were started with --process={process}"
            connected.add(process)
            connections.append(connection)
    absent = [str(process) for process in range(world.processes) if process not in connected]
    if absent and not problem:
        problem = (f"{_format_processes(absent)} of {world.processes} did not connect to {world.coordinator} within "
                   f"{world.timeout} s")
    for connection in connections:
        with connection, contextlib.suppress(OSError):      # the other process may have died
            connection.sendall(f"{problem}\n".encode())
    return problem


def _answer_roll(world: World, address: tuple[str, int], deadline: float) -> str:
    """The part of every other process: connects to process 0 and returns the problem that it sends; "" if there is none."""
    while True:
        try:
            connection = socket.create_connection(address, world.timeout)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return (f"process 0 did not answer at {world.coordinator} within {world.timeout} s "
                        f"({error.strerror or error})")
            time.sleep(0.2)
    with connection:
        connection.settimeout(2 * world.timeout)        # process 0 may have started its own wait later
        try:
            connection.sendall(f"[{world.process}, {world.processes}]\n".encode())
            answer = connection.makefile().readline()
        except OSError:
            answer = ""
    return answer.strip() if answer else f"process 0 at {world.coordinator} ended before all processes had connected"


def supervise(world: World, run) -> int:
    """Calls run() in a child process and returns its exit code.

    If another process dies, prints which one in a line and returns DEAD.
    """
    parent_alive, keep_open = os.pipe()     # the child reads the end of the file when its parent ends
    log_reader, log_writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(keep_open), os.close(log_reader)
        _run_child(run, parent_alive, log_writer)
    os.close(parent_alive), os.close(log_writer)
    return _watch(world, child, log_reader)


def _run_child(run, parent_alive: int, log: int):
    """The child: calls run() and exits. Python's print writes to the terminal; native code and logging write to `log`."""
    threading.Thread(target=_end_with_parent, args=(parent_alive,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent sends one SIGTERM for it
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
        os.dup2(log, number)
    logging.basicConfig(stream=os.fdopen(log, "w", buffering=1))
    try:
        code = run()
    except BaseException as error:
        if _may_come_from_others(error):        # the runtime will report which process died, and abort this one
            time.sleep(2 * HEARTBEAT_SECONDS)
        traceback.print_exc()
        code = 1
    if "jax" in sys.modules:        # shutdown waits for all processes; one that failed alone does not wait for ever
        shutdown = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_SECONDS if code else None)
    os._exit(code)


def _may_come_from_others(error: BaseException | None) -> bool:
    """Whether the end of another process may have caused the error."""
    return error is not None and (bool(COMMUNICATION_ERROR.search(str(error))) or _may_come_from_others(error.__context__))


def _end_with_parent(parent_alive: int):
    os.read(parent_alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(world: World, child: int, log: int) -> int:
    """The parent: passes signals and output on, waits for the child, reports its end and returns the exit code."""
    received, withheld = [], collections.deque(maxlen=200)

    def forward(number, _):
        received.append(number)
        os.kill(child, signal.SIGKILL if received.count(signal.SIGINT) > 1 else signal.SIGTERM)
        if number == signal.SIGINT:
            os.write(2, b"\nstopping: all processes finish one step, save it and end; press Ctrl-C again to quit at once\n")

    reader = threading.Thread(target=_pass_on, args=(log, withheld), daemon=True)
    reader.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(1)      # with a timeout, because a grandchild may keep the pipe open
    if code >= 0 or signal.SIGINT in received:
        return 130 if signal.SIGINT in received else code
    text = "".join(withheld)
    if "RegisterTask" in text:
        print(f"mmx: not all processes connected to {world.where} within {world.timeout} s{advice(world)}", file=sys.stderr)
        return 2
    cause = _find_cause(text)
    print(*([] if cause else withheld), sep="", file=sys.stderr)        # also ends the line of the progress bar
    print(f"mmx: {cause or f'ended by {signal.Signals(-code).name}'}", file=sys.stderr)
    return DEAD if cause else 128 - code


def _pass_on(log: int, withheld):
    """Prints the child's log without messages of severity INFO, Gloo's connection messages and messages about other
    processes; appends the lines of INFO messages and of messages about other processes to `withheld`."""
    printed, in_gloo = True, False
    with os.fdopen(log, errors="replace") as lines:
        for line in lines:
            if begin := LOG_LINE.match(line):       # any other line continues the message of the previous line
                printed = begin[1] != "I" and (begin[2] or begin[3]) not in RUNTIME_FILES
            # Digits or blanks alone are part of a Gloo message only if the previous line is.
            in_gloo = bool(not begin and GLOO.fullmatch(line) and (in_gloo or re.search("[a-z]", line)))
            if not printed:
                withheld.append(line)
            elif not in_gloo and not line.startswith(ABSL_WARNING):
                print(line, end="", file=sys.stderr)


def _find_cause(text: str) -> str:
    """Returns which process died or ended, by the log of the runtime that aborted this one; "" if it does not say."""
    if match := re.search(r"stopped sending heartbeats\):([\d\s,]+)", text):
        cause = f"{_format_processes(re.findall(r'[0-9]+', match[1]))} died: no heartbeat for {HEARTBEAT_SECONDS} s"
    elif match := re.search(r"first task at the barrier: (\d+)", text):
        cause = f"process {match[1]} ended before the others, its own output says why"
    elif "Failed to send RPC" in text:
        cause = "process 0, the coordinator, died or ended"
    elif match := re.search(r"detected fatal errors.*absl::Status: (.+)", text):
        cause = f"another process failed ({match[1]})"
    else:
        return ""
    return f"{cause}; this process ends too, and the same command resumes from the last checkpoint"


def _format_processes(numbers: list[str]) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"
