//! Nodes of a test's own, each a process with its nest, gone with everything in them when the test ends; and callers.

use dunlin_node::config::{NodeConfig, PeerConfig};
use dunlin_node::nest::Nest;
use dunlin_proto::control::{
    ExitStatus, FailureKind, NodeStatus, ProcessRow, Reply, Request, RunInput, RunSpec, WindowSize,
};
use dunlin_proto::frame;
use dunlin_proto::ids::Pid;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Nothing in these tests takes longer, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Node {
    pub config: NodeConfig,
    daemon: Option<Child>,
}

/// Nodes with slots 1, 2, …, named n1, n2, …
pub fn nodes<const N: usize>() -> [Node; N] {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let cluster = format!("d{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    // Held until all are drawn, so that they differ.
    let ports: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses: [SocketAddr; N] = std::array::from_fn(|i| ports[i].local_addr().unwrap());
    drop(ports);
    let peer = |i: usize| PeerConfig {
        name: format!("n{}", i + 1),
        slot: i as u16 + 1,
        address: addresses[i],
    };
    std::array::from_fn(|i| {
        let config = NodeConfig {
            cluster: cluster.clone(),
            name: format!("n{}", i + 1),
            slot: i as u16 + 1,
            modulus: 64,
            listen: addresses[i],
            state_dir: std::env::temp_dir().join(format!("dunlin-{cluster}-n{}", i + 1)),
            peers: (0..N).filter(|j| *j != i).map(peer).collect(),
            shared: vec![PathBuf::from("/")],
            pid_limit: None,
            clock_offset_seconds: 0,
            network: None,
        };
        std::fs::create_dir_all(&config.state_dir).unwrap();
        let mut node = Node { config, daemon: None };
        node.start();
        node
    })
}

pub fn one() -> Node {
    let [node] = nodes();
    node
}

impl Node {
    fn file(&self) -> PathBuf {
        self.config.state_dir.join("node.toml")
    }

    fn text(&self) -> String {
        let c = &self.config;
        let mut text = format!(
            "cluster = '{}'\nname = '{}'\nslot = {}\nlisten = '{}'\nstate_dir = '{}'\nshared = ['/']\n",
            c.cluster,
            c.name,
            c.slot,
            c.listen,
            c.state_dir.display()
        );
        for peer in &c.peers {
            text += &format!(
                "[[peer]]\nname = '{}'\nslot = {}\naddress = '{}'\n",
                peer.name, peer.slot, peer.address
            );
        }
        text
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.config.state_dir.join("daemon.log")).unwrap_or_default()
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        std::fs::write(self.file(), self.text()).unwrap();
        let log = self.config.state_dir.join("daemon.log");
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let daemon = Command::new(exe())
            .arg("node")
            .arg(self.file())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        let end = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.daemon.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < end,
                "the daemon does not start: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self.status();
    }

    /// Another daemon for the same node, which ought to fail; what it says.
    pub fn second(&self) -> String {
        let output = Command::new(exe()).arg("node").arg(self.file()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// kill -9.
    pub fn crash(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM; whether it ended well.
    pub fn stop(&mut self) -> bool {
        let mut daemon = self.daemon.take().unwrap();
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        daemon.wait().unwrap().success()
    }

    pub fn socket(&self) -> PathBuf {
        self.config.state_dir.join("control.sock")
    }

    /// Sends a request.
    pub fn ask(&self, request: &Request) -> Caller {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        frame::write(&mut &stream, request).unwrap();
        Caller(stream)
    }

    /// Sends a request of another user; the kind of failure it meets.
    pub fn ask_as(&self, uid: u32, what: &str, pid: Pid) -> Option<String> {
        // The executable may be where only root can go: the descriptor can be executed nevertheless.
        let output = Command::new("/proc/self/exe")
            .args(["ask", self.socket().to_str().unwrap(), what, &pid.to_string()])
            .uid(uid)
            .gid(uid)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{said} {:?}", output.stderr);
        (said != "fine").then_some(said)
    }

    pub fn run(&self, argv: &[&str]) -> Caller {
        self.ask(&Request::Run(spec(argv)))
    }

    pub fn run_detached(&self, argv: &[&str]) -> Pid {
        self.ask(&Request::Run(RunSpec {
            detach: true,
            ..spec(argv)
        }))
        .started()
    }

    pub fn run_tty(&self, argv: &[&str], size: WindowSize) -> Caller {
        self.ask(&Request::Run(RunSpec {
            tty: Some(size),
            ..spec(argv)
        }))
    }

    pub fn status(&self) -> NodeStatus {
        match self.ask(&Request::Status).last() {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub fn ps(&self) -> (Vec<ProcessRow>, Vec<String>) {
        match self.ask(&Request::Ps { local: false }).last() {
            Reply::Processes { rows, silent } => (rows, silent),
            other => panic!("{other:?}"),
        }
    }

    pub fn row(&self, pid: Pid) -> Option<ProcessRow> {
        self.ps().0.into_iter().find(|r| r.pid == pid)
    }

    pub fn kill(&self, pid: Pid, signal: i32) -> Reply {
        self.ask(&Request::Kill { pid, signal }).last()
    }

    pub fn wait(&self, pid: Pid) -> Reply {
        self.ask(&Request::Wait { pid }).last()
    }

    /// The whole log of a run that has ended or will.
    pub fn log_of(&self, pid: Pid) -> String {
        self.ask(&Request::Logs { pid, follow: true }).outputs().0
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let log = self.log() + &std::fs::read_to_string(self.config.state_dir.join("init.log")).unwrap_or_default();
        if self.daemon.is_some() && !self.stop() {
            println!("the daemon of {} did not end well", self.config.name);
        }
        match Nest::open(&self.config, &exe()) {
            Ok((nest, _)) => nest.destroy().unwrap(),
            Err(e) => println!("the nest of {} is not to be had: {e}", self.config.name),
        }
        if std::thread::panicking() {
            println!("--- daemon.log and init.log of {}\n{log}---", self.config.name);
        }
        let _ = std::fs::remove_dir_all(&self.config.state_dir);
    }
}

/// A connection to a control socket.
pub struct Caller(UnixStream);

impl Caller {
    pub fn next(&self) -> Reply {
        self.try_next().unwrap()
    }

    pub fn try_next(&self) -> io::Result<Reply> {
        frame::read(&mut &self.0)
    }

    pub fn send(&self, input: &RunInput) {
        frame::write(&mut &self.0, input).unwrap();
    }

    pub fn started(&self) -> Pid {
        match self.next() {
            Reply::Started { pid } => pid,
            other => panic!("{other:?}"),
        }
    }

    /// The last reply.
    pub fn last(&self) -> Reply {
        loop {
            let reply = self.next();
            if reply.is_last() {
                return reply;
            }
        }
    }

    /// All output, and the last reply.
    pub fn outputs(&self) -> (String, String, Reply) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.next() {
                Reply::Output { stream: 1, bytes } => out.extend(bytes),
                Reply::Output { bytes, .. } => err.extend(bytes),
                Reply::InputTaken { .. } | Reply::Started { .. } | Reply::Progress(_) => {}
                last => {
                    let text = |bytes| String::from_utf8(bytes).unwrap();
                    return (text(out), text(err), last);
                }
            }
        }
    }

    /// Reads output until it ends with this.
    pub fn output_until(&self, end: &str) -> String {
        let mut seen = Vec::new();
        while !seen.ends_with(end.as_bytes()) {
            let next = self
                .try_next()
                .unwrap_or_else(|e| panic!("{e} after {:?}", String::from_utf8_lossy(&seen)));
            match next {
                Reply::Output { bytes, .. } => seen.extend(bytes),
                Reply::InputTaken { .. } | Reply::Started { .. } => {}
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        String::from_utf8(seen).unwrap()
    }
}

pub fn spec(argv: &[&str]) -> RunSpec {
    RunSpec {
        argv: argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
        env: vec![
            format!("PATH={}", std::env::var("PATH").unwrap()).into_bytes(),
            b"KEY=value".to_vec(),
        ],
        cwd: b"/usr".to_vec(),
        umask: 0o27,
        detach: false,
        tty: None,
    }
}

pub fn code(code: i32) -> Reply {
    Reply::Exited(ExitStatus::Code(code))
}

pub fn killed(signal: i32) -> Reply {
    Reply::Exited(ExitStatus::Signal { signal, core: false })
}

pub fn failure(reply: Reply) -> FailureKind {
    match reply {
        Reply::Error(failure) => failure.kind,
        other => panic!("{other:?}"),
    }
}

/// Waits until something is so.
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn exe() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// `dunlin node`.
pub fn node_role(file: &str) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .init();
    let config = NodeConfig::load(file.as_ref()).unwrap();
    match dunlin_node::daemon::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// A caller of another user.
pub fn ask_role(args: &[String]) -> ExitCode {
    let pid = Pid(args[2].parse().unwrap());
    let request = match args[1].as_str() {
        "kill" => Request::Kill { pid, signal: 9 },
        "wait" => Request::Wait { pid },
        "logs" => Request::Logs { pid, follow: false },
        "can-move" => Request::CanMove { pid, to: None },
        "ps" => Request::Ps { local: false },
        "id" => Request::Run(spec(&["id", "-u"])),
        other => panic!("{other}"),
    };
    let stream = UnixStream::connect(&args[0]).unwrap();
    frame::write(&mut &stream, &request).unwrap();
    let caller = Caller(stream);
    if args[1] == "id" {
        print!("{}", caller.outputs().0.trim());
        return ExitCode::SUCCESS;
    }
    match caller.last() {
        Reply::Error(failure) => print!("{:?}", failure.kind),
        _ => print!("fine"),
    }
    ExitCode::SUCCESS
}
