//! Nothing of a lab is left after `down`, whatever was killed before; with the real daemon.

use dunlin_lab::processes::Identity;
use dunlin_lab::{Lab, Options, down, status};

/// Which part of a running node is killed.
#[derive(Debug, Clone, Copy)]
enum Part {
    Nothing,
    Daemon,
    Init,
    Both,
}

#[test]
fn whatever_is_killed_down_leaves_nothing() {
    for part in [Part::Nothing, Part::Daemon, Part::Init, Part::Both] {
        let lab = Lab::up(
            "leaks",
            &Options {
                nodes: 2,
                ..Options::default()
            },
        );
        let layout = lab.layout().clone();
        lab.node("n1")
            .run_detached(&["sh", "-c", "sleep 1000 & setsid sleep 1000 & wait"]);
        lab.until("the program and its children", |rows| {
            rows.iter().filter(|r| r.command.contains("sleep 1000")).count() >= 3
        });
        let node = status::status(&layout).unwrap().nodes.remove(0);
        let identify = |pid: Option<i32>| Identity::of(pid.unwrap()).unwrap();
        let (daemon, init) = (identify(node.daemon_pid), identify(node.init_pid));
        match part {
            Part::Nothing => {}
            Part::Daemon => daemon.kill(),
            Part::Init => init.kill(),
            Part::Both => {
                daemon.kill();
                init.kill();
            }
        }
        drop(lab);
        assert_eq!(down::traces(&layout), Vec::<String>::new(), "{part:?}");
        assert!(!daemon.is_alive() && !init.is_alive(), "{part:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !mounts.contains(&*layout.dir().display().to_string()),
            "{part:?}: {mounts}"
        );
    }
}

/// A descriptor that the caller left inheritable, such as that of a lock it holds, stays the caller's alone.
#[test]
fn nothing_of_a_lab_has_a_descriptor_of_its_caller() {
    let lock = std::env::temp_dir().join(format!("dunlin-lock-{}", std::process::id()));
    let held = std::fs::File::create(&lock).unwrap();
    let inheritable = rustix::io::dup(&held).unwrap();
    let name = lock.file_name().unwrap().to_string_lossy().into_owned();
    let has_it = |pid: &str| {
        // Of a task that ends meanwhile nothing is held.
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let links = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.into_iter().any(|link| link.to_string_lossy().contains(&name))
    };
    assert!(has_it("self"), "the test holds {name} itself");
    let lab = Lab::up("descriptors", &Options::default());
    let pid = lab.node("n1").run_detached(&["sleep", "1000"]);
    lab.move_process(pid, "n2");
    let own = std::process::id().to_string();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().into_string().ok());
    let holders: Vec<String> = all
        .filter(|pid| *pid != own && pid.parse::<i32>().is_ok() && has_it(pid))
        .collect();
    let named = |pid: &String| {
        format!(
            "{pid} {}",
            std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
        )
    };
    assert_eq!(holders.iter().map(named).collect::<Vec<_>>(), Vec::<String>::new());
    drop((lab, inheritable));
    std::fs::remove_file(lock).unwrap();
}

#[test]
fn a_lab_is_ready_when_up_returns_and_reports_every_node() {
    let lab = Lab::up("ready", &Options::default());
    let seen = status::status(lab.layout()).unwrap();
    assert!(seen.ready, "{seen:#?}");
    assert!(
        seen.nodes.iter().all(|n| n.peers.len() == 2 && n.init_pid.is_some()),
        "{seen:#?}"
    );
    let pid = lab.node("n2").run_detached(&["sleep", "1000"]);
    assert_eq!(pid.0 % 64, 2, "the node with slot 2 gives out its own residue");
    lab.until("it is seen from n1", |rows| {
        rows.iter().any(|r| r.pid == pid && r.home == "n2" && r.node == "n2")
    });
}
