use super::*;
use crate::config::PeerConfig;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

fn config(slot: u16, listen: SocketAddr, peers: &[(u16, SocketAddr)]) -> NodeConfig {
    NodeConfig {
        cluster: "test".into(),
        name: format!("n{slot}"),
        slot,
        modulus: 64,
        listen,
        state_dir: "/nonexistent".into(),
        peers: peers
            .iter()
            .map(|(s, a)| PeerConfig {
                name: format!("n{s}"),
                slot: *s,
                address: *a,
            })
            .collect(),
        shared: vec![],
        pid_limit: None,
        clock_offset_seconds: 0,
        network: None,
    }
}

/// Two nodes; the second one serves `connections` connections with `serve`.
fn pair(
    connections: usize,
    serve: impl Fn(Hello, TcpStream) + Send + 'static,
) -> (Peers, thread::JoinHandle<Vec<io::Result<()>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let own: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let callee = Peers::new(&config(2, address, &[(1, own)]), 22);
    let server = thread::spawn(move || {
        (0..connections)
            .map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                callee.greet(&mut stream).map(|hello| serve(hello, stream))
            })
            .collect()
    });
    (Peers::new(&config(1, own, &[(2, address)]), 11), server)
}

#[test]
fn calls_share_a_connection_and_a_dead_one_is_replaced() {
    // Each connection serves two calls and is closed; four calls need two connections, and no call is lost.
    let (peers, server) = pair(2, |hello, mut stream| {
        assert_eq!((hello.from, hello.boot, hello.purpose), (Slot(1), 11, Purpose::Rpc));
        for _ in 0..2 {
            assert_eq!(frame::read::<PeerRequest>(&mut stream).unwrap(), PeerRequest::Ps);
            frame::write(&mut stream, &PeerReply::NotYet).unwrap();
        }
    });
    for _ in 0..2 {
        assert_eq!(peers.call(Slot(2), &PeerRequest::Ps).unwrap(), PeerReply::NotYet);
    }
    // The end of the first connection has to have arrived before the pool can know of it.
    while peers.idle.lock().unwrap()[&Slot(2)].iter().any(connect::is_quiet) {
        thread::yield_now();
    }
    for _ in 0..2 {
        assert_eq!(peers.call(Slot(2), &PeerRequest::Ps).unwrap(), PeerReply::NotYet);
    }
    assert!(server.join().unwrap().iter().all(Result::is_ok));
}

#[test]
fn a_peer_that_does_not_answer_in_time_is_lost_and_one_that_is_not_there_unreachable() {
    let (peers, server) = pair(1, |_, mut stream| {
        frame::read::<PeerRequest>(&mut stream).unwrap();
        // Until the caller gives up.
        assert!(frame::read::<PeerRequest>(&mut stream).is_err());
    });
    let slow = peers.call_within(Slot(2), &PeerRequest::Ps, Duration::from_millis(50));
    assert!(matches!(slow, Err(PeerError::Lost { .. })), "{slow:?}");
    server.join().unwrap();
    let gone = peers.call(Slot(2), &PeerRequest::Ps);
    assert!(matches!(gone, Err(PeerError::Unreachable { .. })), "{gone:?}");
    assert!(matches!(
        peers.call(Slot(3), &PeerRequest::Ps),
        Err(PeerError::Unknown(Slot(3)))
    ));
}

#[test]
fn strangers_are_refused_with_the_reason() {
    let (peers, server) = pair(3, |_, _| panic!("a stranger was let in"));
    let hello = |change: fn(&mut Hello)| {
        let (_, address) = &peers.nodes[&Slot(2)];
        let mut stream = TcpStream::connect(address).unwrap();
        let mut hello = Hello {
            protocol: PROTOCOL,
            cluster: "test".into(),
            from: Slot(1),
            boot: 1,
            purpose: Purpose::Rpc,
        };
        change(&mut hello);
        frame::write(&mut stream, &hello).unwrap();
        match frame::read(&mut stream).unwrap() {
            Welcome::Refused { reason } => reason,
            Welcome::Accepted { .. } => panic!("accepted"),
        }
    };
    assert!(hello(|h| h.protocol += 1).contains("protocol"));
    assert!(hello(|h| h.cluster = "other".into()).contains("cluster"));
    assert!(hello(|h| h.from = Slot(9)).contains("slot 9"));
    server.join().unwrap();
}

#[test]
fn rubbish_is_refused_without_harm() {
    let (peers, server) = pair(1, |_, _| panic!("rubbish was let in"));
    let (_, address) = &peers.nodes[&Slot(2)];
    let mut stream = TcpStream::connect(address).unwrap();
    io::Write::write_all(&mut stream, b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(server.join().unwrap()[0].is_err());
}

#[test]
fn a_call_to_oneself_stays_inside() {
    struct Me;
    impl Answer for Me {
        fn answer(&self, from: Slot, _: PeerRequest) -> PeerReply {
            assert_eq!(from, Slot(1));
            PeerReply::NotHere
        }
    }
    let own: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let peers = Peers::new(&config(1, own, &[]), 1);
    peers.set_own(Arc::new(Me));
    assert_eq!(peers.call(Slot(1), &PeerRequest::Ps).unwrap(), PeerReply::NotHere);
}
