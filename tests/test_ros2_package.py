"""The ROS 2 package without a ROS 2: build, entry points, launch file, access policy, the guard on a robot's Python."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from fake_robot import EMBODIMENT

from robot_io import messages as m
from robot_io.bus import LATCHED, STATE, open_bus
from robot_io.core.limits import GRIPPERS
from robot_io.nodes import NODES, topics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robot_io"
ENTRIES = {"blackbox", "guard", "live", "operator", "policy", "preflight", "recorder", "teleop", "twin"}
OURS = {name: value for name, value in vars(topics).items() if name.isupper() and str(value).startswith("/")}


# ---- who may say what


def allowed():
    """Return {enclave: {"publish" or "subscribe" or "reply" or "request": names}}."""
    root = ElementTree.parse(PACKAGE / "security" / "policy.xml").getroot()
    assert root.tag == "policy" and root.get("version") == "0.2.0"
    found = {}
    for enclave in root.iterfind("./enclaves/enclave"):
        rules = found.setdefault(enclave.get("path"), {})
        (profile,) = enclave.findall("./profiles/profile")
        assert profile.get("ns") == "/" and enclave.get("path") == f"/dita/{profile.get('node')}"
        for listed in profile:
            assert listed.tag in ("topics", "services") and set(listed.attrib.values()) == {"ALLOW"}
            for verb in listed.attrib:
                rules.setdefault(verb, set()).update(item.text for item in listed)
    return found


def commands():
    """Return every topic that a driver of a shipped embodiment, or ros2_control by default, takes commands from."""
    drivers = [yaml.safe_load(path.read_text()).get("driver") or {} for path in ROOT.glob("configs/embodiment/*.yaml")]
    shipped = {d[key] for d in drivers for key in ("command_topic", "gripper_topic") if d.get(key)}
    return shipped | {
        topics.TARGET_POSE,
        *GRIPPERS.values(),
        "/joint_trajectory_controller/joint_trajectory",
        "/forward_position_controller/commands",
        "/servo_node/delta_twist_cmds",
    }


def matches(pattern, topic):
    return re.fullmatch(pattern.replace("*", ".*"), topic)  # as DDS Security's fnmatch without FNM_PATHNAME


def test_only_the_guard_may_publish_a_command_and_only_one_node_speaks_for_each():
    may = allowed()
    for topic in commands():
        speakers = [path for path, rules in may.items() for p in rules["publish"] if matches(p, topic)]
        assert speakers == ["/dita/guard"], topic
    alone = {
        **dict.fromkeys((topics.EXECUTED, topics.GUARD_STATE), "/dita/guard"),
        **dict.fromkeys((topics.CHUNK, topics.CHUNK_GRIPPER, topics.CONTRACT), "/dita/policy"),
        **dict.fromkeys((topics.ARM, topics.TAKEOVER, topics.SPEED, topics.APPROVE), "/dita/operator"),
        topics.PREFLIGHT: "/dita/preflight",
    }
    for topic, who in alone.items():
        assert [path for path, rules in may.items() if any(matches(p, topic) for p in rules["publish"])] == [who], topic


def test_every_topic_of_ours_can_be_spoken_and_heard_and_nothing_is_open_to_all():
    may = allowed()
    for name, topic in OURS.items():
        for verb in ("publish", "subscribe"):
            assert any(matches(p, topic) for rules in may.values() for p in rules[verb]), f"nobody may {verb} {name}"
    for path, rules in may.items():
        wide = {p for verb in rules.values() for p in verb if "*" in p}
        assert wide <= {"/*/image_raw", "/*/image_raw/compressed", "/dita/*"}, path
        assert "/dita/*" not in rules["publish"], "a wildcard is for listening"
    assert "/dita/arm" in may["/dita/operator"]["request"] and "/dita/arm" in may["/dita/guard"]["reply"]


# ---- the package


def install(tmp_path):
    """Do what colcon does to an ament_python package, without colcon."""
    source = shutil.copytree(PACKAGE, tmp_path / "robot_io", ignore=shutil.ignore_patterns("__pycache__"))
    prefix = tmp_path / "install"
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "install", "--prefix", str(prefix)]
    command += ["--record", str(tmp_path / "log"), "--single-version-externally-managed"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode and "No module named 'setuptools'" in done.stderr:
        pytest.skip("no setuptools in this environment")
    assert done.returncode == 0, done.stderr
    return prefix


def test_the_package_installs_where_ros2_looks(tmp_path):
    prefix = install(tmp_path)
    assert {path.name for path in (prefix / "lib" / "robot_io").iterdir()} == ENTRIES
    share = prefix / "share"
    assert (share / "ament_index" / "resource_index" / "packages" / "robot_io").is_file()
    for name in ("package.xml", "launch/dita.launch.py", "security/policy.xml"):
        assert (share / "robot_io" / name).read_bytes() == (PACKAGE / name).read_bytes()
    (site,) = prefix.glob("lib/python*/site-packages/robot_io")
    shipped = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.parts[-2] not in ("launch",)}
    installed = {p.relative_to(site) for p in site.rglob("*.py")}
    assert shipped - installed <= {Path("setup.py")}, "every module is there"
    assert set(NODES) <= ENTRIES | {"serve"}


def test_the_manifest_depends_on_every_package_whose_messages_travel():
    root = ElementTree.parse(PACKAGE / "package.xml").getroot()
    declared = {item.text for item in root.iter("exec_depend")}
    used = {str(value).split("/")[0] for name, value in vars(m).items() if name.isupper() and "/msg/" in str(value)}
    assert used <= declared and {"rclpy", "std_srvs", "launch_ros"} <= declared
    assert root.findtext("./export/build_type") == "ament_python"


@pytest.mark.skipif(shutil.which("colcon") is None, reason="no colcon")
def test_colcon_builds_it(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "src" / "robot_io", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        ["colcon", "build", "--packages-select", "robot_io"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "install" / "robot_io" / "lib" / "robot_io" / "guard").is_file()


def run_entry(name, *arguments, isolated=True):
    code = f"import sys; sys.argv = [{name!r}, *{list(arguments)!r}]; from robot_io.nodes import ros2; ros2.{name}()"
    block = "import sys; sys.modules['dita'] = None; sys.modules['rclpy'] = None; " if isolated else ""
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", sorted(ENTRIES - {"guard"}))
def test_what_needs_dita_says_so_in_one_line_where_there_is_none(name):
    done = run_entry(name, "checkpoint=x")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == f"error: {name}: dita is not in {sys.executable}: run `dita robot {name}` in dita's own environment\n"
    )


def test_the_guards_entry_helps_and_says_what_is_missing():
    assert "embodiment         string" in run_entry("guard", "--help").stdout
    done = run_entry("guard")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "source a ROS 2" in done.stderr
    done = run_entry("policy", "{", isolated=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ")


MANAGED = """
import sys
sys.path.insert(0, {tests!r})
import fake_rclpy
fake_rclpy.install()
sys.argv = ["guard", "--ros-args"] + {arguments!r}
from robot_io.nodes import ros2
ros2.guard()
"""


def managed_guard(tmp_path, **parameters):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(EMBODIMENT))
    values = {"embodiment": path, "tick_hz": 160.0, "state_timeout": 0.1, "stream_timeout": 0.1, "hold_timeout": 1.0}
    values.update({"max_skew": 0.05, "clamp_margin": 0.25, "require_preflight": "false", **parameters})
    arguments = [word for name, value in values.items() for word in ("-p", f"{name}:={value}")]
    code = MANAGED.format(tests=str(Path(__file__).parent), arguments=arguments)
    env = {**os.environ, "ROS_DOMAIN_ID": "67"}
    return subprocess.Popen([sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, cwd=ROOT, env=env)


def test_the_managed_guard_comes_up_idle_and_leaves_on_a_signal(tmp_path):
    """Over the fake rclpy: parameters -> guard on a lifecycle node -> the same topics."""
    bus = open_bus("dds", "operator", 67)
    said = []
    bus.subscribe(topics.GUARD_STATE, m.STRING, LATCHED, lambda x: said.append(m.json_from_ros(x)))
    process = managed_guard(tmp_path)
    end = time.monotonic() + 30
    while not said and time.monotonic() < end and process.poll() is None:
        bus.spin(0.1)
    writers = [w.node for w in bus.writers(topics.TARGET_POSE)]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=15)
    bus.close()
    assert said and said[-1]["state"] == "IDLE", err
    assert writers == ["guard"] and process.returncode == 0, err


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"tick_hz": 50.0}, "100"),
        ({"tick_hz": "fast"}, "parameter tick_hz must be of type float"),
        ({"embodiment": "none.yaml"}, "none.yaml"),
        ({"embodiment": '""'}, "set its parameters (embodiment, tick_hz, ...)"),
    ],
)
def test_a_guard_with_parameters_that_make_no_sense_ends_in_one_line(parameters, says, tmp_path):
    process = managed_guard(tmp_path, **parameters)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and says in err, err
    assert "Traceback" not in err


# ---- the launch file, over stand-ins for launch and launch_ros


class Made(types.SimpleNamespace):
    def __init__(self, *arguments, **named):
        super().__init__(arguments=arguments, **named)

    def perform(self, context):
        (name,) = self.arguments
        return context.get(name, getattr(self, "default_value", None))


def launched(monkeypatch, **given):
    """Return (environment, guard, {role: command}) that the launch file makes of its arguments."""
    kinds = {
        "launch": ["LaunchDescription"],
        "launch.actions": ["DeclareLaunchArgument", "ExecuteProcess", "OpaqueFunction", "SetEnvironmentVariable"],
        "launch.substitutions": ["EnvironmentVariable", "LaunchConfiguration"],
        "launch_ros": [],
        "launch_ros.actions": ["LifecycleNode"],
        "launch_ros.parameter_descriptions": ["ParameterValue"],
    }
    for name, classes in kinds.items():
        module = types.ModuleType(name)
        for kind in classes:
            setattr(module, kind, type(kind, (Made,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    made = runpy.run_path(str(PACKAGE / "launch" / "dita.launch.py"))["generate_launch_description"]().arguments[0]
    context = {a.arguments[0]: a.default_value for a in made if type(a).__name__ == "DeclareLaunchArgument"}
    missing = [name for name, value in context.items() if value is None and name not in given]
    assert set(given) <= set(context) | {"ROS_DOMAIN_ID"}, "an argument that the file does not declare"
    if missing:
        raise RuntimeError(f"missing launch arguments: {missing}")
    context.update(given)
    environment = {a.arguments[0]: a.arguments[1].perform(context) for a in made if "SetEnv" in type(a).__name__}
    (opaque,) = [a for a in made if type(a).__name__ == "OpaqueFunction"]
    guard, *others = opaque.function(context)
    parameters = {
        name: value.value_type(value.arguments[0].perform(context)) for name, value in guard.parameters[0].items()
    }
    return environment, guard, parameters, {other.name: other.cmd for other in others}


def test_launch_by_default_is_local_guarded_and_preflighted(monkeypatch):
    environment, guard, parameters, commands = launched(monkeypatch, embodiment="arm.yaml", checkpoint="runs/a")
    assert environment == {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_STATIC_PEERS": ""}
    assert (guard.package, guard.executable, guard.name, guard.namespace) == ("robot_io", "guard", "guard", "")
    assert guard.respawn is True and guard.respawn_delay > 0 and guard.ros_arguments == []
    shipped = yaml.safe_load((ROOT / "configs" / "robot.yaml").read_text())
    assert parameters["embodiment"] == "arm.yaml" and parameters["tick_hz"] == shipped["tick_hz"]
    assert set(commands) == {"policy", "preflight", "blackbox"}
    assert commands["policy"] == ["dita", "robot", "policy", "domain_id=0", "checkpoint=runs/a"]


def test_launch_hands_every_argument_to_whom_it_belongs(monkeypatch):
    environment, guard, _, commands = launched(
        monkeypatch,
        **{"embodiment": "arm.yaml", "checkpoint": "runs/a", "dita": "/opt/dita", "ROS_DOMAIN_ID": "7"},
        **{"twin": "true", "recorder": "true", "preflight": "false", "blackbox": "false", "respawn": "false"},
        **{"tool_pose": "/left/pose", "peers": "10.0.0.5", "enclave": "/dita/guard"},
        overrides="env=robosuite 'instruction=pick it up'",
    )
    assert environment["ROS_STATIC_PEERS"] == "10.0.0.5"
    assert ("/tool_pose", "/left/pose") in guard.remappings and guard.respawn is False
    assert guard.ros_arguments == ["--enclave", "/dita/guard"]
    assert set(commands) == {"policy", "twin", "recorder"}
    assert commands["twin"] == [
        *("/opt/dita", "robot", "twin", "domain_id=7", "remap=['/tool_pose:=/left/pose']", "checkpoint=runs/a"),
        *("env=robosuite", "instruction=pick it up"),
    ]


def test_launch_says_what_is_missing(monkeypatch):
    with pytest.raises(RuntimeError, match="embodiment"):
        launched(monkeypatch, checkpoint="runs/a")
    with pytest.raises(ValueError, match="checkpoint:= is missing; policy:=false"):
        launched(monkeypatch, embodiment="arm.yaml")
    _, _, _, commands = launched(
        monkeypatch, embodiment="arm.yaml", policy="false", preflight="false", blackbox="false"
    )
    assert commands == {}


def test_launch_settings_are_ones_that_dita_robot_takes(monkeypatch):
    from dita.cli import compose
    from dita.config import LiveConfig

    _, _, _, commands = launched(monkeypatch, embodiment="a", checkpoint="runs/a", tool_pose="/left/pose")
    config = compose("robot", commands["policy"][3:], LiveConfig)
    assert config.remap == ("/tool_pose:=/left/pose",) and config.domain_id == 0 and config.checkpoint == "runs/a"


# ---- the guard on a robot's own Python


def robot_pythons():
    """Return the Pythons of Humble and Jazzy that this machine has, by version."""
    found = {}
    for version in ("3.10", "3.12"):
        there = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
        found[version] = next((str(p) for p in there if p and version in _version(p)), None)
    return found


def _version(python):
    done = subprocess.run([str(python), "-c", "import sys, venv; print(sys.version)"], capture_output=True, text=True)
    return done.stdout[:4] if done.returncode == 0 else ""


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_guard_runs_from_a_copy_on_the_robots_python_with_numpy_1(version, tmp_path):
    python = robot_pythons()[version]
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    room = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", str(room)], check=True, capture_output=True)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = ["numpy==1.26.4", "pyyaml", *(f"{name}=={pins[name]}" for name in ("cyclonedds", "rosbags", "ruckig"))]
    pip = [str(room / "bin" / "pip"), "install", "-q", "--only-binary", ":all:", "--disable-pip-version-check", *wanted]
    if subprocess.run(pip, capture_output=True, timeout=240).returncode:
        pytest.skip(f"no wheels of {', '.join(wanted)} for Python {version} here")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "robot_io", ignore=shutil.ignore_patterns("__pycache__"))
    limits = {"state_timeout": 0.5, "stream_timeout": 0.5, "hold_timeout": 1.0, "max_skew": 0.05, "clamp_margin": 0.25}
    arguments = {"bus": {"kind": "dds", "domain_id": 62}, "embodiment": EMBODIMENT, "tick_hz": 160.0, **limits}
    code = (
        "import sys, numpy; print(sys.version_info[:2], numpy.__version__, flush=True)\n"
        "from robot_io.nodes import main\ncode = main(sys.argv[1:])\n"
        "bad = {'torch', 'dita', 'hydra', 'zarr', 'mujoco', 'scipy'} & set(sys.modules)\n"
        "print('imported', sorted(bad), flush=True)\nimport os\nos._exit(code)"
    )
    process = subprocess.Popen(
        [str(room / "bin" / "python"), "-c", code, "guard", json.dumps({**arguments, "require_preflight": False})],
        cwd=tmp_path / "copy",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "copy")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    bus = open_bus("dds", "driver", 62)
    said, sent = [], []
    pose, arm = bus.publisher(topics.TOOL_POSE, m.POSE, STATE), bus.publisher(topics.ARM, m.BOOL, STATE)
    contract = bus.publisher(topics.CONTRACT, m.STRING, LATCHED)
    contract.publish(m.json_to_ros(bus.msg, {"embodiment": EMBODIMENT, "hash": "0" * 64}))
    bus.subscribe(topics.GUARD_STATE, m.STRING, LATCHED, lambda x: said.append(m.json_from_ros(x)))
    bus.subscribe(topics.TARGET_POSE, m.POSE, STATE, sent.append)
    bus.timer(0.02, lambda: pose.publish(m.pose_to_ros(bus.msg, bus.now(), [0.0, 0.6, 0.2], "base_link")))
    bus.timer(0.3, lambda: arm.publish(bus.msg(m.BOOL, data=True)) if not sent else None)
    end = time.monotonic() + 60
    while len(sent) < 50 and time.monotonic() < end and process.poll() is None:
        bus.spin(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    bus.close()
    assert len(sent) >= 50, (said[-3:], out)
    np.testing.assert_allclose(m.pose_from_ros(sent[-1])[0], [0.0, 0.6, 0.2], atol=1e-9, err_msg="it holds where it is")
    assert process.returncode == 0, out
    first, *_, last = out.splitlines()
    assert first == f"({version.replace('.', ', ')}) 1.26.4" and last == "imported []"


# ---- no secrets in logs


@pytest.mark.live
def test_no_process_of_the_live_stack_repeats_its_environment(tmp_path, monkeypatch, capfd):
    from test_robot_live import config, fakes

    import robot_io.live as live_module

    canary = "canary-" + "7c1f0e9b52"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "ROS_SECURITY_KEYSTORE", "DITA_ANYTHING"):
        monkeypatch.setenv(name, f"{canary}-{name}")
    lines = []
    read = live_module.Children._read

    def keep(self, name, process):
        read(self, name, process)
        lines.extend(self._lines[name])

    monkeypatch.setattr(live_module.Children, "_read", keep)
    live_module.live(config(tmp_path, 82, episodes=1, seed=5), fakes(82))
    crash = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    with pytest.raises(ChildProcessError) as failed:
        live_module.live(config(tmp_path, 83, out=str(tmp_path / "failed")), {**fakes(83), "policy": crash})
    out, err = capfd.readouterr()
    everything = "\n".join([out, err, str(failed.value), *lines])
    assert any("guard" in line for line in lines) and "success" in everything, "something was said at all"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files, "and written"
    assert canary not in everything
    assert [path for path in files if canary.encode() in path.read_bytes()] == []
