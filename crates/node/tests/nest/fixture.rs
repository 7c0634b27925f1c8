//! A nest of a test's own, gone with all its processes when the test ends, and programs in it.

use dunlin_node::config::NodeConfig;
use dunlin_node::nest::{Nest, NestEvent, SpawnError, SpawnSpec};
use dunlin_proto::ids::Pid;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Nothing in these tests takes longer, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const MODULUS: i32 = 64;
pub const SLOT: i32 = 3;

pub struct Fixture {
    pub nest: Option<Nest>,
    pub events: Receiver<NestEvent>,
    pub config: NodeConfig,
    /// Events that were received while another was waited for.
    put_by: Vec<NestEvent>,
}

/// A program that was started.
pub struct Running {
    pub pid: Pid,
    pub output: OwnedFd,
}

impl Fixture {
    pub fn new() -> Fixture {
        Fixture::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut NodeConfig)) -> Fixture {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let state_dir = std::env::temp_dir().join(format!("dunlin-nest-{name}"));
        let mut config = NodeConfig::parse(&format!(
            "cluster = 'nest-test'\nname = '{name}'\nslot = {SLOT}\nmodulus = {MODULUS}\nlisten = '127.0.0.1:1'\n\
             state_dir = '{}'",
            state_dir.display()
        ))
        .unwrap();
        change(&mut config);
        let (nest, events) = Nest::open(&config, &exe()).unwrap();
        Fixture {
            nest: Some(nest),
            events,
            config,
            put_by: Vec::new(),
        }
    }

    pub fn nest(&self) -> &Nest {
        self.nest.as_ref().unwrap()
    }

    /// The daemon dies and another comes.
    pub fn reopen(&mut self) {
        self.nest = None;
        self.put_by.clear();
        let (nest, events) = Nest::open(&self.config, &exe()).unwrap();
        (self.nest, self.events) = (Some(nest), events);
    }

    pub fn start(&self, argv: &[&str]) -> Running {
        self.try_start(argv, |_| {}).unwrap()
    }

    pub fn try_start(&self, argv: &[&str], change: impl FnOnce(&mut SpawnSpec)) -> Result<Running, SpawnError> {
        let (output, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let path = std::env::var("PATH").unwrap();
        let mut spec = SpawnSpec {
            argv: argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
            env: vec![format!("PATH={path}").into_bytes()],
            cwd: b"/".to_vec(),
            umask: 0o22,
            uid: 0,
            gid: 0,
            groups: vec![],
            stdio: [null.into(), write.try_clone().unwrap(), write],
            controlling_tty: false,
        };
        change(&mut spec);
        let pid = self.nest().spawn(spec)?;
        Ok(Running { pid, output })
    }

    /// Runs a program to its end: its output and wait status.
    pub fn run(&mut self, argv: &[&str]) -> (String, i32) {
        let running = self.start(argv);
        let output = read_all(running.output);
        (output, self.ended(running.pid))
    }

    pub fn sh(&mut self, script: &str) -> String {
        let (output, status) = self.run(&["/bin/bash", "-c", script]);
        assert_eq!(status, 0, "{script}: {output}");
        output
    }

    /// Waits until a child of init has ended: its wait status.
    pub fn ended(&mut self, wanted: Pid) -> i32 {
        let event = self.wait_for(|e| matches!(e, NestEvent::Reaped { pid, .. } if *pid == wanted));
        match event {
            NestEvent::Reaped { status, .. } => status,
            other => panic!("{other:?}"),
        }
    }

    pub fn wait_for(&mut self, wanted: impl Fn(&NestEvent) -> bool) -> NestEvent {
        if let Some(at) = self.put_by.iter().position(&wanted) {
            return self.put_by.remove(at);
        }
        let end = Instant::now() + PATIENCE;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) if wanted(&event) => return event,
                Ok(event) => self.put_by.push(event),
                Err(RecvTimeoutError::Timeout) => panic!("no such event; there were {:?}", self.put_by),
                Err(RecvTimeoutError::Disconnected) => panic!("init's connection ended"),
            }
        }
    }

    /// No event but orphans' ends has come.
    pub fn assert_quiet(&mut self) {
        self.put_by.extend(self.events.try_iter());
        let strange: Vec<_> = self
            .put_by
            .iter()
            .filter(|e| !matches!(e, NestEvent::Reaped { .. }))
            .collect();
        assert!(strange.is_empty(), "{strange:?}");
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.config.state_dir.join("init.log")).unwrap_or_default()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let log = self.log();
        if let Some(nest) = self.nest.take() {
            nest.destroy().unwrap();
        } else if let Ok((nest, _)) = Nest::open(&self.config, &exe()) {
            nest.destroy().unwrap();
        }
        if std::thread::panicking() {
            println!("--- init.log ---\n{log}----------------");
        } else {
            assert_eq!(log, "", "init complained");
            assert!(!cgroup(&self.config).exists(), "the cgroup is left");
            assert!(!self.config.state_dir.join("init.sock").exists());
        }
        let _ = std::fs::remove_dir_all(&self.config.state_dir);
    }
}

fn cgroup(config: &NodeConfig) -> PathBuf {
    PathBuf::from("/sys/fs/cgroup/unified/dunlin")
        .join(&config.cluster)
        .join(&config.name)
}

pub fn exe() -> PathBuf {
    std::env::current_exe().unwrap()
}

pub fn read_all(from: OwnedFd) -> String {
    let mut text = String::new();
    File::from(from).read_to_string(&mut text).unwrap();
    text
}

/// Asserts that these PIDs and TIDs are all of the node's residue; how many different ones there are.
pub fn assert_ours(text: &str) -> BTreeMap<i32, u32> {
    let mut seen = BTreeMap::new();
    for number in text.split_whitespace() {
        let pid: i32 = number
            .parse()
            .unwrap_or_else(|_| panic!("{number:?} in the output {text:.500}"));
        assert_eq!((pid % MODULUS, pid > 100), (SLOT, true), "{pid}");
        *seen.entry(pid).or_insert(0) += 1;
    }
    seen
}
