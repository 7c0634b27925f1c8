//! Making a lab and waiting until it is ready.
//!
//! Owns the order of making; if any of it fails, what was made is taken down again. Refuses to know what a node's
//! configuration means: it writes the keys that a lab differs in.

use crate::error::LabError;
use crate::layout::{Layout, MAX_NODES, OUTSIDE_DEVICE, node_name};
use crate::processes::Identity;
use crate::record::{NodeRecord, Record};
use crate::{cgroup, control, down, exec, links, lock};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long all nodes together may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// How much of a failed daemon's log is shown.
const LOG_TAIL_BYTES: usize = 4096;

/// What a lab is to be like.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many nodes, n1 to nN with slots 1 to N.
    pub nodes: u16,
    /// The cluster's PID modulus.
    pub modulus: u16,
    /// The first PID that is never given out; small values are for tests of the wrap-around.
    pub pid_limit: Option<i32>,
    /// The node that the outside host is linked to.
    pub gateway: String,
    /// The `dunlin` binary that the daemons run.
    pub program: PathBuf,
}

impl Options {
    /// Three nodes of this binary.
    pub fn new(program: impl Into<PathBuf>) -> Options {
        Options {
            nodes: 3,
            modulus: 64,
            pid_limit: None,
            gateway: node_name(1),
            program: program.into(),
        }
    }

    fn check(&self) -> Result<(), LabError> {
        let most = MAX_NODES.min(self.modulus.saturating_sub(1));
        if !(2..=1024).contains(&self.modulus) {
            return Err(LabError::Options(format!(
                "--modulus {} is not between 2 and 1024",
                self.modulus
            )));
        }
        if !(1..=most).contains(&self.nodes) {
            return Err(LabError::Options(format!(
                "--nodes {} is not between 1 and {most}\nhint: nodes have slots from 1 to below the modulus ({})",
                self.nodes, self.modulus
            )));
        }
        if !(1..=self.nodes).any(|slot| node_name(slot) == self.gateway) {
            return Err(LabError::Options(format!(
                "--gateway {} is no node of this lab\nhint: its nodes are n1 to n{}",
                self.gateway, self.nodes
            )));
        }
        if let Some(limit) = self.pid_limit
            && limit < 301
        {
            return Err(LabError::Options(format!(
                "--pid-limit {limit} is too small\nhint: the kernel takes no pid_max below 301"
            )));
        }
        Ok(())
    }
}

/// Makes a lab; returns when every node answers and sees all its peers.
pub fn up(layout: &Layout, options: &Options) -> Result<Record, LabError> {
    options.check()?;
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let held = lock::take(layout)?;
    let traces = down::traces(layout);
    if !traces.is_empty() {
        return Err(LabError::Exists {
            name: layout.name.to_string(),
            found: traces.join(", "),
        });
    }
    make(layout, options).map_err(|(error, daemons)| {
        let error = take_back(layout, error, daemons);
        held.remove();
        error
    })
}

type Daemons = Vec<(String, Child)>;

fn make(layout: &Layout, options: &Options) -> Result<Record, (LabError, Daemons)> {
    let mut record = Record {
        modulus: options.modulus,
        gateway: options.gateway.clone(),
        nodes: (1..=options.nodes)
            .map(|slot| NodeRecord {
                name: node_name(slot),
                slot,
                address: layout.address(slot),
                daemon: None,
            })
            .collect(),
    };
    let mut daemons = Vec::new();
    let mut steps = || {
        let mount = cgroup::mount()?;
        for node in &record.nodes {
            let dir = layout.node_dir(&node.name);
            fs::create_dir_all(&dir).map_err(LabError::io("make directory", &dir))?;
            let path = layout.config(&node.name);
            fs::write(&path, config(layout, options, node)).map_err(LabError::io("write", &path))?;
            cgroup::make(&cgroup::of_daemon(&mount, layout.name.as_str(), &node.name))?;
        }
        links::make(layout, &record.nodes, &options.gateway)?;
        for node in &mut record.nodes {
            let group = cgroup::of_daemon(&mount, layout.name.as_str(), &node.name);
            let child = start(layout, &options.program, &node.name, &group, None)?;
            node.daemon = Identity::of(child.id() as i32);
            daemons.push((node.name.clone(), child));
        }
        record.write(layout)?;
        wait_ready(layout, &mut daemons, options.nodes)
    };
    match steps() {
        Ok(()) => Ok(record),
        Err(error) => Err((error, daemons)),
    }
}

/// Starts the daemon of a node that has lost its own, as [`up`] did; what is left of the node is the daemon's to find.
/// With a fuse, it dies after so many steps.
pub fn start_again(layout: &Layout, program: &Path, node: &str, fuse: Option<u64>) -> Result<Child, LabError> {
    let mount = cgroup::mount()?;
    let group = cgroup::of_daemon(&mount, layout.name.as_str(), node);
    start(layout, program, node, &group, fuse)
}

/// Starts a node's daemon, so that it depends on nothing of the caller: session, group, directory, descriptors.
fn start(layout: &Layout, program: &Path, node: &str, group: &Path, fuse: Option<u64>) -> Result<Child, LabError> {
    let path = layout.daemon_log(node);
    let log = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(LabError::io("open", &path))?;
    let errors = log.try_clone().map_err(LabError::io("open", &path))?;
    let mut command = Command::new(program);
    command
        .arg("node")
        .arg("--config")
        .arg(layout.config(node))
        .arg("--lab-group")
        .arg(group);
    // Which lab the caller meant is nothing to a daemon, or to what it runs.
    command
        .env_remove("DUNLIN_LAB")
        .env_remove("DUNLIN_NODE")
        .env_remove("DUNLIN_SOCKET");
    if let Some(steps) = fuse {
        command.env("DUNLIN_FUSE", steps.to_string());
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(log).stderr(errors);
    exec::spawn(&layout.netns_path(node), &mut command)
}

/// A node's configuration file.
pub fn config(layout: &Layout, options: &Options, node: &NodeRecord) -> String {
    let mut text = format!(
        "cluster = \"{}\"\nname = \"{}\"\nslot = {}\nmodulus = {}\nlisten = \"{}\"\nstate_dir = \"{}\"\n\
         shared = [\"/\"]\nclock_offset_seconds = {}\n",
        layout.name,
        node.name,
        node.slot,
        options.modulus,
        layout.listen(node.slot),
        layout.node_dir(&node.name).display(),
        // As of machines that started at different times: a later node's clocks are neither equal nor in step.
        i64::from(node.slot - 1) * 1000 + i64::from(node.slot / 3) * 500,
    );
    if let Some(limit) = options.pid_limit {
        writeln!(text, "pid_limit = {limit}").expect("strings grow");
    }
    let ((in4, in6), (out4, out6)) = (layout.inside(), layout.outside());
    write!(
        text,
        "\n[network]\ninside = \"{in4}\"\ninside6 = \"{in6}\"\ngateway = \"{}\"\noutside = \"{out4}\"\noutside6 = \"{out6}\"\n",
        options.gateway
    )
    .expect("strings grow");
    if node.name == options.gateway {
        writeln!(text, "outside_device = \"{OUTSIDE_DEVICE}\"").expect("strings grow");
    }
    for slot in (1..=options.nodes).filter(|slot| *slot != node.slot) {
        write!(
            text,
            "\n[[peer]]\nname = \"{}\"\nslot = {slot}\naddress = \"{}\"\n",
            node_name(slot),
            layout.listen(slot)
        )
        .expect("strings grow");
    }
    text
}

/// Waits until every daemon answers and sees its peers; ends early when one has died.
fn wait_ready(layout: &Layout, daemons: &mut Daemons, nodes: u16) -> Result<(), LabError> {
    let deadline = Instant::now() + READY;
    let mut pause = Duration::from_millis(5);
    let mut waiting: Vec<usize> = (0..daemons.len()).collect();
    loop {
        let mut reasons = Vec::new();
        for &i in &waiting {
            let (node, child) = &mut daemons[i];
            if let Ok(Some(status)) = child.try_wait() {
                return Err(not_ready(
                    layout,
                    node,
                    format!("did not stay up: its daemon ended with {status}"),
                ));
            }
            if let Err(why) = is_ready(layout, node, nodes) {
                reasons.push((i, why));
            }
        }
        let Some((first, why)) = reasons.first() else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            let why = format!("is not ready after {} s: {why}", READY.as_secs());
            return Err(not_ready(layout, &daemons[*first].0, why));
        }
        waiting = reasons.iter().map(|(i, _)| *i).collect();
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn is_ready(layout: &Layout, node: &str, nodes: u16) -> Result<(), String> {
    let status = control::status(&layout.control_socket(node), Duration::from_secs(2))?;
    let unseen: Vec<&str> = status
        .peers
        .iter()
        .filter(|(_, seen)| !**seen)
        .map(|(name, _)| name.as_str())
        .collect();
    if status.peers.len() + 1 < usize::from(nodes) {
        return Err(format!("it knows {} peers of {}", status.peers.len(), nodes - 1));
    }
    if unseen.is_empty() {
        Ok(())
    } else {
        Err(format!("it does not see {}", unseen.join(", ")))
    }
}

fn not_ready(layout: &Layout, node: &str, why: String) -> LabError {
    LabError::NotReady {
        lab: layout.name.to_string(),
        node: node.into(),
        why,
        log: log_tail(&layout.daemon_log(node)),
    }
}

fn log_tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..];
    // Whole lines, unless there is only a part of one.
    let start = if tail.len() < bytes.len() {
        tail.iter().position(|b| *b == b'\n').map_or(0, |i| i + 1)
    } else {
        0
    };
    let text = String::from_utf8_lossy(&tail[start..]);
    let text = text.trim_end();
    if text.is_empty() {
        return "  (it said nothing)".into();
    }
    text.lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

/// Takes down what there is of a lab that failed to come up; the first error is the one that counts.
fn take_back(layout: &Layout, error: LabError, daemons: Daemons) -> LabError {
    if let Err(second) = down::down_locked(layout) {
        eprintln!("dunlin: taking lab {} down again: {second}", layout.name);
    }
    for (_, mut child) in daemons {
        // Killed by now; only reaped here.
        let _ = child.try_wait();
    }
    error
}
