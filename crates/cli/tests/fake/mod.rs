//! A daemon for tests of the command line: a thread that answers as a test tells it to.
#![allow(
    dead_code,
    reason = "each test binary has its own copy of this module and uses a part of it"
)]

use dunlin_proto::control::{ExitStatus, Failure, FailureKind, Reply, Request, RunInput};
use dunlin_proto::frame;
use dunlin_proto::ids::Pid;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A daemon that is there for one test.
pub struct Fake {
    /// Its control socket.
    pub socket: PathBuf,
}

/// One connection, after its request.
pub struct Client(UnixStream);

impl Client {
    /// Answers.
    pub fn say(&mut self, reply: Reply) {
        // A client that has gone is what some tests are about.
        let _ = frame::write(&mut self.0, &reply);
    }

    /// What it sends on, after a `Run`; `None` when it has gone.
    pub fn hear(&mut self) -> Option<RunInput> {
        frame::read(&mut self.0).ok()
    }

    /// What it sends on, but for the end of its input.
    pub fn hear_more(&mut self) -> Option<RunInput> {
        loop {
            match self.hear()? {
                RunInput::StdinEnd => {}
                other => return Some(other),
            }
        }
    }
}

impl Fake {
    /// A daemon that answers each request, on a thread of its own, by `answer`.
    pub fn new(answer: impl Fn(Request, &mut Client) + Send + Sync + Clone + 'static) -> Fake {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "dunlin-fake-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let socket = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut client = Client(stream.unwrap());
                let answer = answer.clone();
                std::thread::spawn(move || {
                    if let Ok(request) = frame::read(&mut client.0) {
                        answer(request, &mut client);
                    }
                });
            }
        });
        Fake { socket }
    }

    /// A daemon that answers everything with this.
    pub fn saying(reply: Reply) -> Fake {
        Fake::new(move |_, client| client.say(reply.clone()))
    }

    /// A run (PID 129) that ends as told after `life`.
    pub fn running(life: impl Fn(&mut Client) -> ExitStatus + Send + Sync + Clone + 'static) -> Fake {
        Fake::new(move |request, client| {
            assert!(matches!(request, Request::Run(_)), "{request:?}");
            client.say(Reply::Started { pid: Pid(129) });
            let status = life(client);
            client.say(Reply::Exited(status));
        })
    }

    /// The command line, talking to it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dunlin"));
        command
            .arg("--socket")
            .arg(&self.socket)
            .args(arguments)
            .stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What a command says, and how it ends.
    pub fn dunlin(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A failure with a hint.
pub fn failing(kind: FailureKind) -> Reply {
    Reply::Error(Failure {
        kind,
        message: "it is so".into(),
        hint: Some("do something".into()),
    })
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
