//! Nodes of one machine, each with a nest and a mover, and nothing of a daemon but the connections between them.

use dunlin_node::config::{NodeConfig, PeerConfig};
use dunlin_node::mover::{Mover, Parts, Streams};
use dunlin_node::nest::{Nest, NestEvent, Response, SpawnSpec};
use dunlin_node::peers::Peers;
use dunlin_node::processes::exits::Exits;
use dunlin_node::processes::{Hidden, NestProc, Residents};
use dunlin_proto::control::{MoveMode, MoveReport, MoveRequest, WaitFor};
use dunlin_proto::frame;
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::peer::{PeerReply, PeerRequest, Purpose};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

struct NoStreams;

impl Streams for NoStreams {
    fn identify(&self, _: BorrowedFd<'_>) -> Option<(RunId, u8)> {
        None
    }
    fn open(&self, _: RunId, _: u8) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn settle(&self, _: RunId, _: u8) -> io::Result<()> {
        Ok(())
    }
    fn departed(&self, _: Pid, _: &[(RunId, u8)], _: Slot) {}
    fn arrived(&self, _: Pid, _: &[(RunId, u8)]) {}
}

pub struct Node {
    pub name: String,
    pub nest: Nest,
    pub mover: Arc<Mover>,
    state: PathBuf,
}

pub struct Rig {
    pub nodes: Vec<Node>,
    pub work: PathBuf,
}

impl Rig {
    pub fn up(count: u16) -> Rig {
        let tag = format!("engine-{}", std::process::id());
        let work = std::env::temp_dir().join(&tag);
        std::fs::create_dir_all(&work).unwrap();
        let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        let nodes = listeners.into_iter().enumerate().map(|(i, listener)| {
            let peers = (0..count).filter(|j| *j != i as u16).map(|j| PeerConfig {
                name: format!("n{}", j + 1),
                slot: j + 1,
                address: addresses[j as usize],
            });
            let config = NodeConfig {
                cluster: tag.clone(),
                name: format!("n{}", i + 1),
                slot: i as u16 + 1,
                modulus: 64,
                listen: addresses[i],
                state_dir: work.join(format!("n{}", i + 1)),
                peers: peers.collect(),
                shared: vec!["/".into()],
                pid_limit: None,
                clock_offset_seconds: 1000 * i as i64,
                network: None,
            };
            Node::start(config, listener)
        });
        Rig {
            nodes: nodes.collect(),
            work,
        }
    }

    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name == name).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = node.nest.destroy();
            let _ = std::fs::remove_dir_all(&node.state);
        }
        let _ = std::fs::remove_dir_all(&self.work);
    }
}

impl Node {
    fn start(config: NodeConfig, listener: TcpListener) -> Node {
        std::fs::create_dir_all(&config.state_dir).unwrap();
        let state = config.state_dir.clone();
        let name = config.name.clone();
        let (nest, events) = Nest::open(&config, &std::env::current_exe().unwrap()).unwrap();
        let peers = Arc::new(Peers::new(&config, 7));
        let late: Arc<OnceLock<Arc<Mover>>> = Arc::default();
        let ended = late.clone();
        let proc = NestProc::open(nest.root()).unwrap();
        let exits = Exits::start(proc, move |pid, how| {
            if let Some(mover) = ended.get() {
                mover.ended(pid, how.status);
            }
        });
        let mover = Mover::start(Parts {
            config: Arc::new(config),
            nest: nest.clone(),
            peers: peers.clone(),
            hidden: Arc::new(Hidden::default()),
            residents: Arc::new(Residents::default()),
            exits: exits.unwrap(),
            streams: Arc::new(NoStreams),
            edge: dunlin_node::edge::Edge::none(),
        })
        .unwrap();
        let _ = late.set(mover.clone());
        let watcher = mover.clone();
        std::thread::spawn(move || {
            for event in events {
                tracing::debug!(?event, node = watcher.config.name, "nest");
                if let NestEvent::Notification { id, pid, nr, args } = event
                    && !watcher.notified(id, pid, nr, &args)
                {
                    let _ = watcher.nest.respond(id, Response::Continue);
                }
            }
        });
        let server = mover.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mover, peers) = (server.clone(), peers.clone());
                std::thread::spawn(move || {
                    if let Ok(mut stream) = stream
                        && let Ok(hello) = peers.greet(&mut stream)
                    {
                        serve(&mover, hello.from, hello.purpose, stream);
                    }
                });
            }
        });
        Node {
            name,
            nest,
            mover,
            state,
        }
    }

    pub fn spawn(&self, argv: &[&str], output: &Path) -> Pid {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let file = || {
            OwnedFd::from(
                std::fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(output)
                    .unwrap(),
            )
        };
        self.nest
            .spawn(SpawnSpec {
                argv: argv.iter().map(|a| a.as_bytes().to_vec()).collect(),
                env: vec![b"PATH=/usr/bin:/bin".to_vec()],
                cwd: b"/".to_vec(),
                umask: 0o22,
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                stdio: [null(), file(), file()],
                controlling_tty: false,
            })
            .unwrap()
    }

    pub fn move_out(&self, pid: Pid, to: &str, wait: WaitFor, verify: bool) -> Result<Vec<MoveReport>, String> {
        use dunlin_node::mover::{MoveOutcome, Report};
        let request = MoveRequest {
            pid,
            to: to.into(),
            tree: false,
            mode: MoveMode::Demand,
            wait,
            verify,
        };
        for report in self.mover.move_out(request).unwrap() {
            match report {
                Report::Progress(_) => {}
                Report::Outcome(MoveOutcome::Moved(reports)) => return Ok(reports),
                Report::Outcome(MoveOutcome::Refused(o)) => return Err(format!("refused: {o:?}")),
                Report::Outcome(MoveOutcome::Failed(f)) => return Err(f.message),
            }
        }
        Err("no outcome".into())
    }
}

fn serve(mover: &Arc<Mover>, from: Slot, purpose: Purpose, mut stream: TcpStream) {
    match purpose {
        Purpose::Relocation => mover.serve(from, stream),
        Purpose::Pages(_) => drop(mover.images.serve(stream)),
        Purpose::Rpc => {
            while let Ok(request) = frame::read::<PeerRequest>(&mut stream) {
                let reply = match request {
                    PeerRequest::Ahead { by, pid } => mover.ahead_here(by, pid),
                    PeerRequest::Recall { by, pid, ranges } => mover.recall_here(by, pid, ranges),
                    PeerRequest::Drain { pid } => PeerReply::Drain(mover.drain_here(pid)),
                    PeerRequest::Examine { plans } => PeerReply::Obstacles(mover.examine_plans(&plans).unwrap()),
                    PeerRequest::Clocks => PeerReply::Clocks(dunlin_node::mover::raw_clocks()),
                    _ => PeerReply::NotHere,
                };
                if frame::write(&mut stream, &reply).is_err() {
                    return;
                }
            }
        }
        _ => {}
    }
}
