//! Whether somebody answers for the address that the world knows.

use super::{Row, Status};
use dunlin_node::config::NodeConfig;
use dunlin_sys::links;
use std::net::IpAddr;
use std::path::Path;

/// Looks at the gateway's device, if a configuration says that this node is the gateway. What else is wrong with it is said elsewhere.
pub fn row(config: &Path) -> Option<Row> {
    let config = NodeConfig::load(config).ok()?;
    let network = config.network.as_ref()?;
    let name = network.outside_device_of(&config.name)?;
    let device = links::devices().ok()?.into_iter().find(|device| device.name == name);
    let unanswered = device.as_ref().map(|device| network.unanswered(&device.addresses));
    Some(judged(name, unanswered))
}

/// `None`: there is no such device.
fn judged(name: &str, unanswered: Option<Vec<IpAddr>>) -> Row {
    let row = |status, found, hint| Row {
        name: "outside address".into(),
        status,
        found,
        purpose: "the gateway's device answers for what the world sends to programs",
        consequence: match status {
            Status::Ok => "",
            Status::Note => "nobody outside finds the programs, and no answer finds back to them",
            Status::Missing => "the daemon does not start",
        },
        hint,
    };
    let Some(unanswered) = unanswered else {
        let hint = "correct `outside_device`, or bring the device up".into();
        return row(Status::Missing, format!("there is no device {name}"), hint);
    };
    let Some(first) = unanswered.first() else {
        return row(Status::Ok, format!("{name} has it"), String::new());
    };
    let found = format!("{name} does not have {first}");
    row(Status::Note, found, format!("ip address add {first} dev {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_nobody_answers_for_is_named() {
        assert_eq!(judged("eth1", Some(Vec::new())).status, Status::Ok);
        assert_eq!(judged("eth1", None).status, Status::Missing);
        let one = judged("eth1", Some(vec!["192.0.2.10".parse().unwrap()]));
        assert_eq!(one.status, Status::Note);
        assert_eq!(one.hint, "ip address add 192.0.2.10 dev eth1");
    }
}
