//! The life of a lab on the real kernel, with daemons that only answer `Status`: this test binary, started again.

use dunlin_lab::processes::Identity;
use dunlin_lab::{LabError, LabName, Layout, Options, down, exec, links, status, up};
use dunlin_proto::control::{NodeStatus, Reply, Request};
use dunlin_proto::frame;
use dunlin_proto::ids::Slot;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Not a test of its own: what the labs below start as their daemons.
#[test]
fn daemon_role() {
    let Ok(config) = std::env::var("FAKE_DAEMON_CONFIG") else {
        return;
    };
    let text = std::fs::read_to_string(config).unwrap();
    let value = |key: &str| -> String {
        let line = text.lines().find(|l| l.starts_with(&format!("{key} = "))).unwrap();
        line.split_once(" = ").unwrap().1.trim_matches('"').to_owned()
    };
    let (me, state_dir) = (value("name"), value("state_dir"));
    let names = text.lines().filter_map(|l| l.strip_prefix("name = "));
    let peers = names.map(|n| n.trim_matches('"').to_owned()).filter(|n| *n != me);
    let status = NodeStatus {
        name: me.clone(),
        slot: Slot(value("slot").parse().unwrap()),
        modulus: value("modulus").parse().unwrap(),
        version: "fake".into(),
        daemon_pid: std::process::id() as i32,
        init_pid: 1,
        processes: 0,
        peers: peers.map(|p| (p, true)).collect(),
    };
    eprintln!("the fake daemon of {me} is here");
    // A child in a session of its own, as init is: it must go down with the lab.
    let child = Command::new("setsid").args(["sleep", "1000"]).spawn().unwrap();
    std::thread::spawn(move || child.wait_with_output());
    assert!(
        !Path::new(&state_dir).join("fail").exists() && me != "n13",
        "{me} was told to fail"
    );
    let listener = UnixListener::bind(Path::new(&state_dir).join("control.sock")).unwrap();
    loop {
        let mut stream = listener.accept().unwrap().0;
        if let Ok(Request::Status) = frame::read(&mut stream) {
            let _ = frame::write(&mut stream, &Reply::Status(status.clone()));
        }
    }
}

/// A program that understands `node --config FILE --lab-group DIR` as the real one does.
fn fake_program() -> PathBuf {
    let path = std::env::temp_dir().join(format!("fake-dunlin-{}", std::process::id()));
    let me = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\necho 0 > $5/cgroup.procs\nFAKE_DAEMON_CONFIG=$3 exec {} --exact daemon_role --nocapture\n",
        me.display()
    );
    // Written once, under another name first: it must never be open for writing while another test executes it.
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    });
    path
}

fn options(nodes: u16) -> Options {
    Options {
        nodes,
        ..Options::new(fake_program())
    }
}

fn layout(name: &str) -> Layout {
    Layout::new(
        format!("life-{name}-{}", std::process::id())
            .parse::<LabName>()
            .unwrap(),
    )
}

fn nothing_is_left(layout: &Layout) {
    assert_eq!(down::traces(layout), Vec::<String>::new());
    let state = layout.dir().display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(&state) && !mounts.contains(&layout.netns("n1")),
        "{mounts}"
    );
    assert!(!layout.lock().exists());
}

#[test]
fn a_lab_comes_up_answers_and_goes_without_a_trace() {
    let layout = layout("whole");
    let record = up::up(&layout, &options(3)).unwrap();
    let seen = status::status(&layout).unwrap();
    assert!(seen.ready, "{seen:#?}");
    assert_eq!(
        seen.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(),
        ["n1", "n2", "n3"]
    );
    assert_eq!(seen.nodes[0].daemon_pid, record.nodes[0].daemon.map(|d| d.pid));

    // The link carries big frames between nodes, unfragmented, and no node is its own peer.
    let to_n3 = layout.address(3).to_string();
    let mut ping = Command::new("sh");
    ping.args([
        "-c",
        &format!("ip route get {to_n3} && cat /sys/class/net/eth0/mtu /proc/net/dev"),
    ]);
    let output = run_in(&layout, "n1", ping.stdout(std::process::Stdio::piped()));
    assert!(output.contains("dev eth0"), "{output}");

    let again = up::up(&layout, &options(1)).unwrap_err();
    assert!(
        matches!(again, LabError::Exists { .. }) && again.to_string().contains("hint:"),
        "{again}"
    );
    assert!(
        status::status(&layout).unwrap().ready,
        "a refused `up` must leave the lab alone"
    );

    assert!(down::down(&layout).unwrap());
    nothing_is_left(&layout);
    assert!(record.nodes.iter().all(|n| !n.daemon.unwrap().is_alive()));
    assert!(!down::down(&layout).unwrap(), "the second time there is nothing to do");
}

#[test]
fn nodes_reach_each_other_and_not_the_host() {
    let layout = layout("net");
    up::up(&layout, &options(2)).unwrap();
    let address = layout.address(2);
    let mut listen = Command::new("python3");
    listen.args(["-c", &format!("import socket; s = socket.create_server(('{address}', 9)); print('on', flush=True); s.accept()[0].send(b'hello')")]);
    let mut server = exec::spawn(&layout.netns_path("n2"), listen.stdout(std::process::Stdio::piped())).unwrap();
    std::io::Read::read_exact(server.stdout.as_mut().unwrap(), &mut [0; 2]).unwrap();
    let fetch = format!("import socket; print(socket.create_connection(('{address}', 9), 1).recv(9))");
    let mut from_host = Command::new("python3");
    assert!(
        !from_host.args(["-c", &fetch]).output().unwrap().status.success(),
        "the host must not reach a lab"
    );
    let mut from_n1 = Command::new("python3");
    let got = run_in(
        &layout,
        "n1",
        from_n1.args(["-c", &fetch]).stdout(std::process::Stdio::piped()),
    );
    assert_eq!(got.trim(), "b'hello'");
    server.wait().unwrap();
    down::down(&layout).unwrap();
    nothing_is_left(&layout);
}

#[test]
fn labs_side_by_side_do_not_touch_each_other() {
    let (one, two) = (layout("one"), layout("two"));
    std::thread::scope(|scope| {
        scope.spawn(|| up::up(&one, &options(2)).unwrap());
        scope.spawn(|| up::up(&two, &options(2)).unwrap());
    });
    down::down(&one).unwrap();
    assert!(status::status(&two).unwrap().ready);
    down::down(&two).unwrap();
    nothing_is_left(&one);
    nothing_is_left(&two);
}

#[test]
fn what_is_left_of_a_lab_after_kill_9_goes_too() {
    let layout = layout("killed");
    let record = up::up(&layout, &options(2)).unwrap();
    // The daemon dies, its child lives on; and somebody is busy in a node's network.
    record.nodes[0].daemon.unwrap().kill();
    let mut stray = exec::spawn(&layout.netns_path("n2"), Command::new("sleep").arg("1000")).unwrap();
    let identity = Identity::of(stray.id() as i32).unwrap();
    // The record is gone as after a `kill -9` of `up` itself.
    std::fs::remove_dir_all(layout.dir()).unwrap();
    assert!(down::down(&layout).unwrap());
    stray.wait().unwrap();
    assert!(!identity.is_alive());
    nothing_is_left(&layout);
}

#[test]
fn an_interrupted_up_is_cleared_away() {
    let layout = layout("half");
    std::fs::create_dir_all(layout.node_dir("n1")).unwrap();
    // As `ip netns add` leaves it when it is killed in the middle: a file, and nothing mounted on it.
    std::fs::create_dir_all("/run/netns").unwrap();
    std::fs::write(layout.netns_path("n1"), "").unwrap();
    assert_eq!(links::namespaces(&layout).len(), 1);
    assert!(matches!(up::up(&layout, &options(1)), Err(LabError::Exists { .. })));
    assert!(down::down(&layout).unwrap());
    nothing_is_left(&layout);
}

#[test]
fn a_daemon_that_fails_is_quoted_and_the_lab_is_taken_down() {
    let layout = layout("fails");
    let error = up::up(&layout, &options(13)).unwrap_err();
    let LabError::NotReady { node, log, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(node, "n13");
    assert!(log.contains("n13 was told to fail"), "{error}");
    nothing_is_left(&layout);
}

#[test]
fn down_waits_for_an_up_under_way() {
    let layout = layout("race");
    std::thread::scope(|scope| {
        let up = scope.spawn(|| up::up(&layout, &options(2)));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !layout.lock().exists() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let down = scope.spawn(|| down::down(&layout));
        up.join().unwrap().unwrap();
        down.join().unwrap().unwrap();
    });
    down::down(&layout).unwrap();
    nothing_is_left(&layout);
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_made() {
    let layout = layout("options");
    let few = Options {
        modulus: 4,
        ..options(4)
    };
    assert!(matches!(up::up(&layout, &few), Err(LabError::Options(_))));
    assert!(matches!(up::up(&layout, &options(0)), Err(LabError::Options(_))));
    let small = Options {
        pid_limit: Some(100),
        ..options(1)
    };
    assert!(matches!(up::up(&layout, &small), Err(LabError::Options(_))));
    nothing_is_left(&layout);
}

fn run_in(layout: &Layout, node: &str, command: &mut Command) -> String {
    let child = exec::spawn(&layout.netns_path(node), command).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}
