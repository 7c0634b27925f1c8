//! What the scenarios share: a directory for a program, and the journey round a lab.
//!
//! Owns compiling, the directories, and the order of nodes. Refuses to wait a fixed time: a journey goes on when the
//! program has shown that it is alive where it is.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod fuse;
pub mod machine;
pub mod obedient;
pub mod outside;

use dunlin_lab::Lab;
use dunlin_lab::harness::{NotMoved, Run, request};
use dunlin_proto::control::{MoveReport, MoveRequest, RunSpec, WaitFor};
use dunlin_proto::ids::Pid;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Twice round a lab of three nodes and on: 1→2, 2→3, 3→1 (home), and again.
pub const JOURNEY: [&str; 7] = ["n2", "n3", "n1", "n2", "n3", "n1", "n2"];
/// A move that came fewer times than this has shown nothing.
pub const LEAST_MOVES: usize = 5;

/// A directory that all nodes see at the same path; removed with the value.
#[derive(Debug)]
pub struct Workshop {
    dir: PathBuf,
}

impl Workshop {
    /// An empty one that every user may enter.
    pub fn new(name: &str) -> Workshop {
        let dir = std::env::temp_dir().join(format!("dunlin-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory for the program");
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("its mode");
        Workshop { dir }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A directory in it, made.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir_all(&dir).expect("a directory in the workshop");
        dir
    }

    /// A file in it, with these contents.
    pub fn file(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, contents).expect("a file in the workshop");
        path
    }

    /// Compiles one of `programs/` with the compiler for its language; the binary's path.
    #[track_caller]
    pub fn compile(&self, source: &str) -> PathBuf {
        let (stem, language) = source.rsplit_once('.').expect("a source has a suffix");
        let binary = self.path(stem);
        let out = binary.to_str().expect("a plain path");
        let c = ["-O1", "-g", "-pthread", "-o", out];
        let (compiler, flags): (&str, &[&str]) = match language {
            "c" => ("gcc", &c),
            "cpp" => ("g++", &c),
            "go" => ("go", &["build", "-o", out]),
            "java" => ("javac", &["-d", out]),
            other => panic!("no compiler for .{other}"),
        };
        let mut command = Command::new(compiler);
        command.args(flags).arg(program(source)).env("GO111MODULE", "off");
        if language == "c" {
            command.arg("-lm");
        }
        // Go wants a cache; the workshop's goes away with it.
        command.env("GOCACHE", self.path("go-cache"));
        let done = command
            .output()
            .unwrap_or_else(|e| panic!("{compiler}: {e}\nhint: scripts/prepare installs it"));
        assert!(
            done.status.success(),
            "{compiler} {source}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        binary
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // A program that is still about may write into it once more; what is left is in the temporary directory.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// One of the sources in `programs/`.
pub fn program(source: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/programs")
        .join(source)
}

/// A run of this command in this directory.
pub fn spec_in(dir: &Path, argv: &[&str]) -> RunSpec {
    RunSpec {
        cwd: dir.as_os_str().as_encoded_bytes().to_vec(),
        ..dunlin_lab::harness::spec(argv)
    }
}

/// Waits until a self-checking program has finished two more rounds: it lives, and computes, where it is now.
#[track_caller]
pub fn lives(run: &Run) {
    let rounds = |text: &str| text.matches("\nround ").count();
    let before = rounds(&run.stdout());
    run.until_stdout("two more rounds", |text| rounds(text) >= before + 2);
}

/// Moves a process (or its tree) through the whole journey; every other move does not wait for its pages, so that the
/// next one starts while they are still elsewhere.
#[track_caller]
pub fn journey(lab: &Lab, pid: Pid, tree: bool, mut between: impl FnMut()) {
    for (i, node) in JOURNEY.into_iter().enumerate() {
        between();
        let wait = if i % 2 == 0 { WaitFor::Drained } else { WaitFor::Resumed };
        let asked = MoveRequest {
            tree,
            wait,
            ..request(pid, node)
        };
        moved(lab, &asked).unwrap_or_else(|e| panic!("move {i} of {pid}, to {node}: {e:#?}"));
    }
    between();
}

/// Moves a process (or its tree) round and round until it ends by itself, but at most so often: a fast machine would
/// make a thousand moves of it. How many times it was moved.
#[track_caller]
pub fn until_it_ends(lab: &Lab, pid: Pid, tree: bool, at_most: usize) -> usize {
    for (moves, node) in ["n2", "n3", "n1"].into_iter().cycle().enumerate().take(at_most) {
        let asked = MoveRequest {
            tree,
            ..request(pid, node)
        };
        match moved(lab, &asked) {
            Ok(_) if gone(lab, pid) => return moves + 1,
            Ok(_) => {}
            Err(why) if gone(lab, pid) => {
                println!("it ended while move {moves}, to {node}, was under way: {why:?}");
                return moves;
            }
            Err(why) => panic!("move {moves} of {pid}, to {node}: {why:#?}"),
        }
    }
    at_most
}

/// Moves a process and compares source and destination in full.
#[track_caller]
pub fn verified(lab: &Lab, pid: Pid, node: &str) -> MoveReport {
    let asked = MoveRequest {
        verify: true,
        ..request(pid, node)
    };
    let mut reports = moved(lab, &asked).unwrap_or_else(|e| panic!("verified move of {pid}, to {node}: {e:#?}"));
    reports.remove(0)
}

/// A move. Two obstacles are there for a moment only: a program that looks at itself is in the middle of a file in /proc,
/// and one that has just forked shares descriptors with a child that stays. Then, and only then, it is asked again.
pub fn moved(lab: &Lab, asked: &MoveRequest) -> Result<Vec<MoveReport>, NotMoved> {
    for _ in 0..50 {
        match lab.move_as(asked.clone()) {
            Err(NotMoved::Refused(obstacles))
                if obstacles.iter().all(|o| o.object.contains("/proc/") || stays(&o.why)) => {}
            Err(NotMoved::Failed(failure)) if stays(&failure.message) || failure.message.contains("(/proc/") => {}
            other => return other,
        }
    }
    lab.move_as(asked.clone())
}

/// Is it about a process that is not moved along?
fn stays(reason: &str) -> bool {
    reason.contains("stays here")
}

fn gone(lab: &Lab, pid: Pid) -> bool {
    lab.process(pid).is_none_or(|row| row.state == 'Z')
}
